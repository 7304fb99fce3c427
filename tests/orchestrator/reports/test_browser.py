"""A report in a real browser: it asks nobody for anything, fits a phone, and has a light and a dark theme."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
    ),
)
# The page that measures another one, in a frame as wide as a phone: a window cannot be so narrow.
FRAME = """<!DOCTYPE html><iframe id="frame" src="report.html" style="width: {width}px; height: 800px; border: 0">
</iframe><pre id="found"></pre><script>
document.getElementById("frame").onload = () => {{
  const page = document.getElementById("frame").contentDocument, style = getComputedStyle(page.body);
  const texts = [...page.querySelectorAll("svg")].map(one => one.querySelector("desc").textContent);
  const seen = [...page.querySelectorAll("svg text")].map(one => one.getBoundingClientRect().height);
  const loaded = page.defaultView.performance.getEntriesByType("resource").map(one => one.name);
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth, loaded: loaded, texts: texts,
    smallest: Math.min(...seen), paper: style.backgroundColor, ink: style.color,
    curve: getComputedStyle(page.querySelector("svg path[style*='--blue']")).stroke,
  }});
}};
</script>"""
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: install chromium")

Look = Callable[..., dict[str, Any]]


@pytest.fixture
def look(sweep: Path, tmp_path: Path) -> Look:
    """Open the report of a sweep, and return what a script beside it finds."""
    shutil.copyfile(sweep / "pruning" / "report.html", tmp_path / "report.html")

    def open_page(width: int, *options: str) -> dict[str, Any]:
        (tmp_path / "frame.html").write_text(FRAME.format(width=width))
        words = (*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", *options)
        shown = browse(*words, "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frame.html").as_uri())
        (found,) = re.findall(r'<pre id="found">(.+?)</pre>', shown, flags=re.DOTALL)
        return json.loads(html.unescape(found))

    return open_page


def browse(*words: str) -> str:
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_a_phone_and_asks_for_nothing(width: int, look: Look) -> None:
    found = look(width)
    assert found["width"] == width
    assert found["needed"] <= width
    assert found["loaded"] == []
    assert found["smallest"] >= 8
    assert len(found["texts"]) >= 7
    assert all(len(text) > 20 for text in found["texts"])


def test_it_is_light_or_dark_as_the_reader_prefers(look: Look) -> None:
    light, dark = look(800), look(800, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == (LIGHT, DARK)
    assert len({light["ink"], dark["ink"], light["paper"], dark["paper"]}) == 4
    assert light["curve"] != dark["curve"]


def test_no_script_runs_in_it(look: Look, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    script = "<script>document.body.style.backgroundColor = 'red'</script></body>"
    page.write_text(page.read_text().replace("</body>", script))
    assert look(800)["paper"] == LIGHT
    page.write_text(page.read_text().replace("Content-Security-Policy", "other"))
    assert look(800)["paper"] == "rgb(255, 0, 0)"


def test_it_prints(sweep: Path, tmp_path: Path) -> None:
    page, printed = sweep / "pruning" / "report.html", tmp_path / "report.pdf"
    browse(*QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", page.as_uri())
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 1 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 8
