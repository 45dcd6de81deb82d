"""All figures in the order of the report, and writing them as PNG and as SVG fit for inlining."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from geopd.report.accuracy_figures import accuracy, accuracy_against_geometry
from geopd.report.control_figures import controls, mixture_ends, mixture_paths
from geopd.report.drawing import Drawing, Subject
from geopd.report.endpoint_figures import overlaps, principal_energy, sparsity_by_module
from geopd.report.gate_figures import gates
from geopd.report.gradient_figures import gradient_ranks
from geopd.report.hover import overlay
from geopd.report.map_figures import change_map, sparsity_map
from geopd.report.path_figures import increments, similarity, trajectories
from geopd.report.projection_figures import projection_benchmarks, projection_curves
from geopd.report.size_figures import sparsity_against_size, update_size
from geopd.report.spectrum_figures import spectra
from geopd.report.style import styled
from geopd.report.variant_figures import variants
from geopd.results import write_atomically

FIGURES: tuple[Callable[[Subject], Drawing], ...] = (
    sparsity_by_module,
    sparsity_against_size,
    sparsity_map,
    change_map,
    spectra,
    overlaps,
    principal_energy,
    trajectories,
    similarity,
    increments,
    accuracy,
    accuracy_against_geometry,
)
"""Figures of every folder; of one with tagged runs they show its baselines."""

STUDY_FIGURES: tuple[Callable[[Subject], Drawing | None], ...] = (
    update_size,
    projection_curves,
    projection_benchmarks,
    controls,
    mixture_paths,
    mixture_ends,
    variants,
    gates,
    gradient_ranks,
)
"""Figures of all runs; None where the folder has nothing of their kind."""


def draw_all(subject: Subject, folder: Path) -> list[tuple[Drawing, str]]:
    """Draw every figure into ``folder`` as PNG and SVG; returns each with its SVG text (empty where not drawn)."""
    drawn = []
    with styled():
        for draw in (*FIGURES, *STUDY_FIGURES):
            drawing = draw(subject.baselines if draw in FIGURES else subject)
            if drawing is not None:
                drawn.append((drawing, save(drawing.figure, drawing.name, folder) if drawing.figure else ""))
    return drawn


def save(figure: Figure, name: str, folder: Path) -> str:
    """Write ``name.png`` and ``name.svg`` atomically; returns the SVG as it can stand inside an HTML page."""
    write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, format="png"))
    figure.set_layout_engine("none")  # the layout is found; finding it again would take as long as drawing
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().decode("utf-8")
    write_atomically(folder / f"{name}.svg", lambda path: path.write_text(svg, encoding="utf-8"))
    return inline(svg, name, overlay(figure))


def inline(svg: str, name: str, marks: str = "") -> str:
    """The ``<svg>`` element alone: no prologue or metadata, ids unique to ``name``, width left to the page.

    ``marks``: an element that goes over all others.

    Several figures share one page, and matplotlib reuses ids and styles every element of the document.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = body.replace("xlink:href=", "href=").replace("*{stroke", f"#figure-{name} svg *{{stroke")
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    width = re.search(r'width="([\d.]+)pt"', head)
    if box is None or width is None:
        raise ValueError(f"{name}: an SVG without size cannot be inlined")
    natural = f"{float(width[1]) * 4 / 3:.0f}"
    style = f"width:100%;max-width:{natural}px;min-width:min(34rem,{natural}px)"
    rest = f"{rest[: rest.rindex('</svg>')]}{marks}</svg>"
    return f'<svg {box[0]} style="{style}" role="img" aria-labelledby="title-{name}">{rest}'
