from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from geopd.report.gallery import FIGURES, STUDY_FIGURES

pytestmark = pytest.mark.browser

# Runs in the page itself: sizes as laid out, anchors as the browser resolves them, resources as it fetched them.
_PROBE = """<script>addEventListener('load', () => {
  const sizes = [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect());
  const broken = [...document.querySelectorAll('a[href^="#"]')]
    .filter(a => !document.getElementById(a.getAttribute('href').slice(1)));
  document.querySelectorAll('details').forEach(d => d.open = true);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  parent.postMessage(['figures', sizes.filter(s => s.width > 200 && s.height > 60).length,
    'broken', broken.length, 'fetched', performance.getEntriesByType('resource').length,
    'overflow', wide ? 1 : 0, 'width', window.innerWidth].join(' '), '*');
});</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI is set but no chromium is on PATH; install it")
        pytest.skip("no chromium on PATH")
    return found


def run(chromium: str, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"]
    offline = ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]
    told = ["--enable-logging=stderr", "--log-level=0"]
    command = [chromium, "--headless", *quiet, *offline, *told, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def framed(page: Path, folder: Path, width: int, extra: str = "") -> Path:
    """A page that shows a copy of ``page``, probed, in a frame of that width: windows have a smallest width.

    The report forbids scripts; only this copy of it lets the probe run, and pass its findings to the outer page.
    """
    html = page.read_text()
    probed = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert probed != html
    inner = folder / "probed.html"
    inner.write_text(probed.replace("</body>", f"{_PROBE}{extra}</body>"))
    outer = folder / "frame.html"
    outer.write_text(
        f'<iframe src="{inner.name}" style="width:{width}px;height:2000px;border:0"></iframe><pre id="probe"></pre>'
        "<script>addEventListener('message', e => document.getElementById('probe').textContent = e.data)</script>"
    )
    return outer


def console_errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["study_report", "full_report"])
def page(request: pytest.FixtureRequest) -> tuple[Path, int]:
    """A page, and how many figures it should have."""
    study = len(STUDY_FIGURES) if request.param == "full_report" else 0
    return request.getfixturevalue(request.param), len(FIGURES) + study


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_lays_out_every_figure_and_fetches_nothing(
    chromium: str, page: tuple[Path, int], tmp_path: Path, width: int
) -> None:
    report, figures = page
    outer = framed(report, tmp_path, width)
    done = run(chromium, tmp_path / "profile", "--virtual-time-budget=8000", "--dump-dom", outer.as_uri())
    found = re.search(r'<pre id="probe">([^<]+)</pre>', done.stdout)
    assert found is not None
    words = found[1].split()
    assert dict(zip(words[::2], map(int, words[1::2]), strict=True)) == {
        "figures": figures,
        "broken": 0,
        "fetched": 0,
        "overflow": 0,
        "width": width,
    }
    assert console_errors(done.stderr) == []


def test_an_error_on_the_console_would_be_seen(chromium: str, study_report: Path, tmp_path: Path) -> None:
    outer = framed(study_report, tmp_path, 1280, "<script>nothing_of_this_name()</script>")
    done = run(chromium, tmp_path / "profile", "--virtual-time-budget=4000", "--dump-dom", outer.as_uri())
    (error,) = console_errors(done.stderr)
    assert "nothing_of_this_name" in error


def test_a_screenshot_of_the_page_is_not_blank(chromium: str, full_report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    run(chromium, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,3000", full_report.as_uri())
    from matplotlib.image import imread

    pixels = imread(shot)
    assert pixels.shape[:2] == (3000, 1200)
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.5).mean() < 0.5


_POINTED = """<script>addEventListener('load', () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  let marks = 0, found = 0, named = 0;
  for (const group of document.querySelectorAll('figure svg .marks')) {
    const last = group.lastElementChild;
    last.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});
    const box = last.getBoundingClientRect();
    const under = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    marks += 1;
    found += under === last;
    named += last.querySelector('title').textContent.split('\\n').length > 1;
  }
  parent.postMessage(`pointed ${marks} ${found} ${named}`, '*');
});</script>"""


def test_the_pointer_meets_the_mark_it_is_over(chromium: str, page: tuple[Path, int], tmp_path: Path) -> None:
    report, _ = page
    outer = framed(report, tmp_path, 1280, _POINTED)
    done = run(chromium, tmp_path / "profile", "--virtual-time-budget=8000", "--dump-dom", outer.as_uri())
    found = re.search(r"pointed (\d+) (\d+) (\d+)", done.stdout)
    assert found is not None
    groups = report.read_text().count('<g class="marks"')
    assert groups > 8
    assert [int(number) for number in found.groups()] == [groups] * 3
