"""The README's picture: the first part of a run's report, down to its plot, as Chromium draws it.

python tests/report_picture.py out/demo docs/report.png
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lilliput.report import load
from lilliput.report_page import html

WIDTH = 1100
BOTTOM = """<script>onload = () => {
  const last = document.querySelector('.plot') || document.querySelector('.tables');
  document.title = JSON.stringify(Math.ceil(last.getBoundingClientRect().bottom));
};</script>"""


def draw(report: Path, picture: Path) -> None:
    """A PNG of WIDTH pixels; as high as headline, table and plot are."""
    chromium = shutil.which("chromium") or sys.exit("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html(load(report)).replace("</body>", f"{BOTTOM}</body>"), encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command.append(f"--user-data-dir={folder}/profile")
        asked = [*command, f"--window-size={WIDTH},900", "--dump-dom", page.as_uri()]
        found = re.search(
            r"<title>(\d+)</title>", subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        )
        assert found, "the page did not say how high it is"
        height = json.loads(found[1]) + 24
        shot = [f"--window-size={WIDTH},{height}", f"--screenshot={picture.resolve()}", page.as_uri()]
        subprocess.run([*command, *shot], capture_output=True, check=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
