"""Names and values under the pointer: where the marks are in the figure's own SVG, and what they say."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from geopd.report.gallery import save
from geopd.report.hover import name_categories, name_points, name_rows
from geopd.report.style import new_figure, null_handle, percent_axis, styled

Shape = tuple[float, float, list[str]]


def hovered(figure: Figure, folder: Path) -> tuple[str, list[Shape]]:
    """The SVG as inlined, and the middle and the lines of every title in it."""
    with styled():
        svg = save(figure, "tried", folder)
    shapes = []
    for x, y, title in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>(.*?)</title>', svg, re.DOTALL):
        shapes.append((float(x), float(y), unescape(title).split("\n")))
    rect = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"><title>(.*?)</title>'
    for x, y, width, height, title in re.findall(rect, svg, re.DOTALL):
        middle = float(x) + float(width) / 2, float(y) + float(height) / 2
        shapes.append((*middle, unescape(title).split("\n")))
    return svg, shapes


def said(shapes: list[Shape]) -> list[list[str]]:
    return [lines for *_, lines in shapes]


def panel() -> tuple[Figure, Axes]:
    figure = new_figure(5, 3)
    return figure, figure.subplots()


def test_every_mark_has_its_title_where_the_figure_draws_it(tmp_path: Path) -> None:
    figure, axes = panel()
    axes.plot([1, 2, 30], [0.5, 0.25, 0.123456], marker="o", color="#0072B2")
    axes.set_xscale("log")
    percent_axis(axes, "y")
    axes.set(xlabel="step", ylabel="share")
    axes.set_title("sparsity <of all>")
    figure.legend(handles=[Line2D([], [], color="#0072B2", marker="o", label="opd & friends")])
    svg, shapes = hovered(figure, tmp_path)
    drawn = [
        (float(x), float(y)) for x, y in re.findall(r'<use href="[^"]+" x="([\d.]+)" y="([\d.]+)"[^>]*0072b2', svg)
    ]
    assert len(drawn) == 4, "three marks and the legend's"
    assert np.allclose([shape[:2] for shape in shapes], drawn[:3], atol=0.06)
    assert said(shapes) == [
        ["sparsity <of all>", "opd & friends", "step: 1", "share: 50%"],
        ["sparsity <of all>", "opd & friends", "step: 2", "share: 25%"],
        ["sparsity <of all>", "opd & friends", "step: 30", "share: 12.35%"],
    ]
    assert "<title>" not in (tmp_path / "tried.svg").read_text(), "the file for a paper is without"


def test_cells_of_a_map_are_covered_each_by_its_own(tmp_path: Path) -> None:
    figure, axes = panel()
    image = axes.imshow(np.array([[1.0, 2.0, 3.0], [4.0, np.nan, 6.0]]), aspect="auto")
    name_categories(axes, "x", ["q", "k", "v"])
    name_categories(axes, "y", ["layer 0", "layer 1"])
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("times the median")
    svg, shapes = hovered(figure, tmp_path)
    assert said(shapes) == [
        ["layer 0", "q", "times the median: 1"],
        ["layer 0", "k", "times the median: 2"],
        ["layer 0", "v", "times the median: 3"],
        ["layer 1", "q", "times the median: 4"],
        ["layer 1", "v", "times the median: 6"],
    ]
    left, top, width, height = map(
        float, re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"><title>', svg)[0]
    )
    (box,) = (axes.bbox.extents * 72 / figure.dpi,)
    assert (left, top) == pytest.approx((box[0], 72 * 3 - box[3]), abs=0.06)
    assert (3 * width, 2 * height) == pytest.approx((box[2] - box[0], box[3] - box[1]), abs=0.2)


def test_rows_are_named_with_and_without_labels_and_nulls_by_their_mark(tmp_path: Path) -> None:
    figure = new_figure(6, 3)
    for axes, labels in zip(figure.subplots(1, 2), (True, False), strict=True):
        axes.plot(0.5, 1, marker="s", color="#009E73", linestyle="")
        axes.plot(0.25, 0, marker="D", color="#222222", markerfacecolor="none", linestyle="")
        axes.errorbar(0.5, 1, xerr=0.1, capsize=2, linestyle="")
        axes.plot([0.1, 0.9], [1, 1], color="#009E73")
        name_rows(axes, ["opd", "rlvr"], labels=labels)
        axes.set_title("overlap")
    figure.legend(handles=[null_handle("gaussian")])
    null = "null: Gaussian update of the same size"
    panel_says = [["overlap", "rlvr", "0.5"], ["overlap", null, "opd", "0.25"]]
    assert said(hovered(figure, tmp_path)[1]) == panel_says * 2


def test_points_are_named_one_by_one_and_what_is_out_of_sight_says_nothing(tmp_path: Path) -> None:
    figure, axes = panel()
    points = axes.scatter([1, 2, 3, 4], [1, 2, np.nan, 4], rasterized=True)
    name_points(points, ["one", "two", "nowhere", "outside"])
    axes.scatter([1.5], [1.5])
    name_points(axes.scatter([1.5] * 2001, [2.5] * 2001, rasterized=True), ["one of a crowd"] * 2001)
    axes.set(xlim=(0, 3), ylim=(0, 3), xlabel="x", ylabel="y")
    assert said(hovered(figure, tmp_path)[1]) == [["one", "x: 1", "y: 1"], ["two", "x: 2", "y: 2"]]


def test_shared_axes_and_columns_share_their_labels_and_titles(tmp_path: Path) -> None:
    figure = new_figure(5, 4)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, title in enumerate(("left", "right")):
        grid[0][column].set_title(title)
        grid[1][column].set_xlabel(f"x {title}")
    grid[0][0].set_ylabel("upper")
    grid[1][0].set_ylabel("lower")
    for axes in grid.ravel():
        axes.plot([1], [123456], marker="o")
    assert said(hovered(figure, tmp_path)[1]) == [
        [title, f"x {title}: 1", f"{row}: 123456"] for row in ("upper", "lower") for title in ("left", "right")
    ]
