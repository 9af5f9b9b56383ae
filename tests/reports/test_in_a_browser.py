"""Pages in headless Chromium: it has nothing to say about them, and they fit a phone. Skipped where there is none."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bertray.reports.pages import make_page
from bertray.storage.location import Location
from tests.reports.test_pages import labelled, profile_of, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"),
]
# The page in a frame of a phone's width: how wide does it become?
_FRAME = """<!doctype html><title>-</title><iframe src="{}" width="{}" height="800"></iframe><script>
const frame = document.querySelector("iframe");
onload = () => document.title = "width " + frame.contentDocument.documentElement.scrollWidth;
</script>"""


def browse(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder}", "--allow-file-access-from-files", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def evaluation(folder: Path) -> Path:
    return labelled(folder / "evaluation")


def held_run(folder: Path) -> Path:
    names = [f"a_long_name_that_cannot_be_broken_{number}" for number in range(77)]
    before = profile_of(dict.fromkeys(names, 10))
    return write_run(folder, 2, profile_of({names[0]: 900, "<script>alert(1)</script>": 9}, tokens=64), before)


@pytest.mark.parametrize("make", [evaluation, held_run])
def test_a_page_in_chromium(make: Callable[[Path], Path], tmp_path: Path) -> None:
    page = Path(make_page(Location.of(str(make(tmp_path))), 20).path)
    seen = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in seen.stderr
    assert "<h1>" in seen.stdout
    for width in (390, 1280):
        frame = tmp_path / f"{width}.html"
        frame.write_text(_FRAME.format(page.as_uri(), width))
        shown = browse(frame, tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom")
        found = re.search(r"<title>width (\d+)</title>", shown.stdout)
        assert found, shown.stderr
        assert int(found[1]) <= width


def test_what_a_page_would_fetch_is_said(tmp_path: Path) -> None:
    """The test above would see it."""
    page = Path(make_page(Location.of(str(evaluation(tmp_path))), 20).path)
    page.write_text(page.read_text().replace("</main>", "<script>alert(1)</script></main>"))
    assert "CONSOLE" in browse(page, tmp_path / "profile", "--dump-dom").stderr
