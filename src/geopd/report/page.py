"""The report: one self-contained HTML file and the figures beside it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from geopd.report.claims_table import claims_table
from geopd.report.drawing import Subject
from geopd.report.gallery import draw_all
from geopd.report.notes import notes_html
from geopd.report.study_tables import study_tables
from geopd.report.tables import coverage, glossary, headline, moved_most, provenance
from geopd.results import Results, read_results, write_atomically


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``figures/`` and ``report.html`` for a results folder and return the page's path.

    The page opens offline: figures are inlined as SVG and nothing is requested from anywhere.

    Args:
        folder: a results folder, as ``geopd measure`` writes it. Claims appear where ``claims.json`` was decided.
        out: where the page goes (default ``report.html`` in the folder); figures go beside it.

    Raises:
        ValueError: if the folder is no results folder, or ``out`` is a directory.
    """
    results = read_results(folder)
    page = Path(out) if out is not None else results.root / "report.html"
    if page.is_dir():
        raise ValueError(f"{page}: is a directory; name the HTML file to write")
    html = render(results, page.parent / "figures")
    write_atomically(page, lambda path: path.write_text(html, encoding="utf-8"))
    return page


def render(results: Results, figures: Path) -> str:
    """The page's text; draws the figures into ``figures`` on the way."""
    environment = Environment(
        loader=PackageLoader("geopd.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    subject = Subject.of(results)
    drawings = [(drawing, Markup(svg)) for drawing, svg in draw_all(subject, figures)]
    notes = [
        {"title": note.get("title", "Note"), "html": Markup(notes_html(str(note.get("text", ""))))}
        for note in results.notes
    ]
    css, _, _ = environment.loader.get_source(environment, "page.css")  # type: ignore[union-attr]
    return environment.get_template("page.jinja").render(
        css=Markup(css),
        name=results.root.resolve().name,
        headline=headline(subject),
        moved=moved_most(subject),
        claims=claims_table(results),
        tables=study_tables(subject),
        drawn=[(d, svg) for d, svg in drawings if svg],
        absent=[d for d, svg in drawings if not svg],
        notes=notes,
        coverage=coverage(results),
        provenance=provenance(results),
        glossary=glossary(results),
    )
