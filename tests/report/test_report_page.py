from __future__ import annotations

import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from geopd.claims import decide_claims
from geopd.report import write_report
from geopd.report.drawing import Subject, main_benchmark
from geopd.report.gallery import FIGURES, inline
from geopd.report.notes import notes_html
from geopd.report.style import COLOURS, SHARED_SFT, chosen, shorten
from geopd.results import read_results
from synthetic_results import STUDY, Folder, Run, every_matrix

ONE = Run("my-finetune", "other", 0.02, steps=(None,))


class Page(HTMLParser):
    """What a page holds: ids, links and every address that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        if tag == "a":
            self.links.append(found["href"])
        elif tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)
        self.fetched += [found[name] for name in ("src", "srcset", "data", "xlink:href") if name in found]
        if tag in ("image", "use"):
            self.fetched.append(found.get("href", ""))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(study_report: Path) -> Path:
    return study_report


def test_nothing_on_the_page_is_fetched_from_anywhere(report: Path) -> None:
    html = report.read_text()
    page = Page(html)
    assert all(address.startswith(("#", "data:image/")) for address in page.fetched), page.fetched
    assert "url(http" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html) < 6_000_000


def test_every_link_stays_on_the_page_and_finds_its_anchor(report: Path) -> None:
    page = Page(report.read_text())
    assert len(page.links) > 15
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))


def test_every_figure_is_inlined_and_written_as_png_and_svg(report: Path) -> None:
    html = report.read_text()
    assert html.count("<svg") == len(FIGURES)
    for name in re.findall(r'<figure id="figure-(\w+)"', html):
        png = (report.parent / "figures" / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert width > 600
        assert height > 200
        assert "<metadata>" not in inline((report.parent / "figures" / f"{name}.svg").read_text(), name)


def test_ids_inside_figures_are_not_shared_and_all_references_resolve(report: Path) -> None:
    html = report.read_text()
    ids = set(Page(html).ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= ids
    assert set(re.findall(r'<use[^>]* href="#([^"]+)"', html)) <= ids


def test_the_headline_shows_nulls_origins_accuracy_and_the_papers_numbers_as_such(report: Path) -> None:
    text = " ".join(Page(report.read_text()).text)
    for said in ("null 11.1 %", "sft, from base", "2 different origins", "42.0 % ± 2.2", "For orientation only"):
        assert said in text
    assert "4.701" in text


def test_claims_coverage_provenance_and_glossary_are_told(report: Path) -> None:
    text = " ".join(Page(report.read_text()).text)
    for said in (
        "Shows here, and a Gaussian update of the same size shows it too.",
        "one seed: a verdict needs several",
        "layers.2.mlp.up_proj: the tensor holds <NaN> values",
        "origin is fp32, checkpoints are bf16",
        "a buffer, not a weight",
        "undefined (no visible change at eta=0.001)",
        "2.13.0",
        "How many directions carry the update's energy",
    ):
        assert said in text, said


def test_notes_are_rendered_and_their_markup_stays_text(report: Path) -> None:
    html = report.read_text()
    assert "<strong>nothing</strong>" in html
    assert "<th>stage</th>" in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a & b", "<p>a &amp; b</p>"),
        ("- one\n- two", "<ul><li>one</li><li>two</li></ul>"),
        ("# Head", "<h4>Head</h4>"),
        ("`x<y`", "<p><code>x&lt;y</code></p>"),
        ("", ""),
    ],
)
def test_notes_know_a_little_markdown(text: str, html: str) -> None:
    assert notes_html(text) == html


def test_run_names_are_escaped(tmp_path: Path) -> None:
    run = replace(ONE, name="<b>&tuned $x_1$")
    html = write_report(Folder(tmp_path / "r", runs=(run,), layers=1, entrywise_only=True).write()).read_text()
    assert "&lt;b&gt;&amp;tuned" in html
    assert "<b>&tuned" not in html


def test_one_checkpoint_without_a_number_makes_a_page_and_says_what_is_not_drawn(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r", runs=(ONE,), layers=1, evaluated=False).write()
    decide_claims(root)
    text = " ".join(Page(write_report(root).read_text()).text)
    assert "1 run, compared with the weights it started from" in text
    assert "a path needs a run with at least two numbered checkpoints" in text
    assert "the folder has no evaluations" in text
    assert "lines can be looked at in this folder" in text


def test_entrywise_folders_draw_what_they_have(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r", runs=(ONE,), layers=2, evaluated=False, entrywise_only=True).write()
    html = write_report(root).read_text()
    assert re.findall(r'<figure id="figure-(\w+)"', html) == ["sparsity", "sparsity_map", "overlaps"]
    assert "no angle or singular-value vectors were stored" in html


def test_a_folder_in_which_everything_failed_says_so(tmp_path: Path) -> None:
    lost = replace(ONE, failed=every_matrix(1))
    html = write_report(Folder(tmp_path / "r", runs=(lost,), layers=1, evaluated=False).write()).read_text()
    assert "<figure" not in html
    assert html.count("the tensor holds &lt;NaN&gt; values") == len(every_matrix(1))


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r", runs=(ONE,), layers=1, evaluated=False, entrywise_only=True).write()
    page = write_report(root, tmp_path / "out" / "page.html")
    assert page.is_file()
    assert (tmp_path / "out" / "figures" / "sparsity.svg").is_file()
    assert not (root / "report.html").exists()
    with pytest.raises(ValueError, match="is a directory; name the HTML file"):
        write_report(root, tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json here"):
        write_report(tmp_path)


def test_fine_tuning_from_the_base_and_from_the_anchor_differ_in_colour_line_and_marker(study_folder: Path) -> None:
    styles = Subject.of(read_results(study_folder)).styles
    assert [style.run for style in styles.values()] == ["sft", "sft_continued", "opd", "rlvr"]
    first, second = styles["sft"], styles["sft_continued"]
    assert (first.colour, second.colour) == (COLOURS["sft"], SHARED_SFT)
    assert first.line != second.line
    assert first.marker != second.marker
    assert len({*COLOURS.values(), SHARED_SFT}) == len(COLOURS) + 1


def test_where_runs_are_too_many_every_paradigm_keeps_some(tmp_path: Path) -> None:
    runs = tuple(replace(run, name=f"{run.name}{i}", steps=(None,)) for run in STUDY for i in range(4))
    root = Folder(tmp_path / "r", runs=runs, layers=1, entrywise_only=True, evaluated=False).write()
    styles = list(Subject.of(read_results(root)).styles.values())
    kept = chosen(styles, 5)
    assert len(kept) == 5
    assert {style.paradigm for style in kept} == {"sft", "opd", "rlvr"}
    for draw in FIGURES:
        drawing = draw(Subject.of(read_results(root)))
        assert (drawing.figure is None) == (drawing.missing is not None)


def test_long_names_keep_both_ends() -> None:
    assert shorten("short") == "short"
    cut = shorten("a" * 30 + "z" * 30)
    assert len(cut) <= 26
    assert cut.startswith("aaa")
    assert cut.endswith("zzz")


def test_the_benchmark_shown_is_sampled_and_held_out_where_there_is_a_choice() -> None:
    rows = [("selection", "avg@8", 500), ("held_out", "greedy", 2000), ("held_out", "avg@8", 300)]
    table = pl.DataFrame(rows, schema=["benchmark", "decoding", "n"], orient="row")
    assert main_benchmark(table) == ("held_out", "avg@8")
    assert main_benchmark(table.filter(pl.col("decoding") == "greedy")) == ("held_out", "greedy")
    assert main_benchmark(table.clear()) is None


def test_the_null_curve_is_not_drawn_where_no_update_lies(tmp_path: Path) -> None:
    runs = (Run("far", "sft", 0.2, steps=(None,)), Run("near", "rlvr", 2e-4, steps=(None,)))
    results = read_results(Folder(tmp_path / "r", runs=runs, layers=3, evaluated=False).write())
    (drawn,) = (figure(Subject.of(results)) for figure in FIGURES if figure.__name__ == "sparsity_against_size")
    assert drawn.figure is not None
    (line,) = drawn.figure.axes[0].get_lines()
    sizes = line.get_xdata()
    gaps = [after / before for before, after in pairwise(sizes)]  # nan beside the break
    assert sum(size != size for size in sizes) == 1
    assert not any(gap >= 5 for gap in gaps)
