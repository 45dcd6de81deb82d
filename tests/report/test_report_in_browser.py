from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from geopd.report.gallery import FIGURES

pytestmark = pytest.mark.browser

# Runs in the page itself: sizes as laid out, anchors as the browser resolves them, resources as it fetched them.
_PROBE = """<script>addEventListener('load', () => {
  const sizes = [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect());
  const broken = [...document.querySelectorAll('a[href^="#"]')]
    .filter(a => !document.getElementById(a.getAttribute('href').slice(1)));
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const out = document.createElement('pre');
  out.id = 'probe';
  out.textContent = ['figures', sizes.filter(s => s.width > 200 && s.height > 100).length,
    'broken', broken.length, 'fetched', performance.getEntriesByType('resource').length,
    'overflow', wide ? 1 : 0].join(' ');
  document.body.append(out);
});</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI is set but no chromium is on PATH; install it")
        pytest.skip("no chromium on PATH")
    return found


@pytest.fixture(scope="module")
def page(study_report: Path) -> Path:
    return study_report


def run(chromium: str, profile: Path, *arguments: str) -> str:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    offline = ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [chromium, "--headless", *quiet, *offline, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


def test_the_page_lays_out_every_figure_and_fetches_nothing(chromium: str, page: Path, tmp_path: Path) -> None:
    html = page.read_text()
    # The page forbids scripts; only this copy of it lets the probe run.
    probed = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert probed != html
    copy = tmp_path / "probed.html"
    copy.write_text(probed.replace("</body>", f"{_PROBE}</body>"))
    dom = run(chromium, tmp_path / "profile", "--virtual-time-budget=4000", "--dump-dom", copy.as_uri())
    found = re.search(r'<pre id="probe">([^<]+)</pre>', dom)
    assert found is not None
    words = found[1].split()
    assert dict(zip(words[::2], map(int, words[1::2]), strict=True)) == {
        "figures": len(FIGURES),
        "broken": 0,
        "fetched": 0,
        "overflow": 0,
    }


def test_a_screenshot_of_the_page_is_not_blank(chromium: str, page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    run(chromium, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,3000", page.as_uri())
    from matplotlib.image import imread

    pixels = imread(shot)
    assert pixels.shape[:2] == (3000, 1200)
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.5).mean() < 0.5
