"""report.html in headless Chromium, as wide as a desk and as a phone: it lays out without overflow, and without errors.

The page has no script of its own; a copy gets one that says how wide it became and what stands out of it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_report import failing, full, inconclusive, passing, report

from lilliput.report import Report
from lilliput.report_page import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
ASK = """<script>
onload = () => {
  const out = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !e.closest('thead');
  }).map(e => e.tagName + ' ' + e.textContent.slice(0, 40));
  const over = [...document.querySelectorAll('h1, h3, p, li, dt, dd, td, summary, blockquote')].filter(
    e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.tagName + ' ' + e.textContent.slice(0, 40));
  const said = {inner: innerWidth, wide: document.documentElement.scrollWidth, out, over};
  document.title = JSON.stringify(said);
};
</script>"""


def opened(page: str, width: int, folder: Path) -> tuple[dict[str, object], str]:
    """What the page says of itself at that width, and what Chromium wrote to its console."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"{ASK}</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    frame = folder / "frame.html"  # a window of Chromium's cannot be as narrow as a phone, a frame can
    frame.write_text(
        f'<iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        "<script>onload = () => { document.title = frames[0].document.title; };</script>"
    )
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--window-size=1600,3000",
         "--hide-scrollbars", frame.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    said: dict[str, object] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    return said, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("made", [report(), report(passing()), full()], ids=["three", "one", "full"])
def test_a_page_fits_its_window_and_says_no_error(made: Report, width: int, tmp_path: Path) -> None:
    said, console = opened(html(made), width, tmp_path)
    assert said["inner"] == width
    assert said["wide"] == width
    assert said["out"] == []
    assert said["over"] == [], "text that runs over what stands beside it"
    assert console == ""


def test_the_script_sees_what_stands_out_and_the_console_an_error(tmp_path: Path) -> None:
    page = html(report(failing(), inconclusive()))
    said, console = opened(page.replace("<main>", '<main><p style="width:2000px">wide</p>'), 390, tmp_path)
    assert int(str(said["wide"])) > 390
    assert said["out"] != []
    _, console = opened(page.replace("<main>", "<main><script>nothing.here()</script>"), 390, tmp_path)
    assert "nothing is not defined" in console
