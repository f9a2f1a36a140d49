"""The figures of docs/ are those that their script draws, and each is shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
if not FIGURES.is_dir():
    pytest.skip("there is no documentation beside these tests", allow_module_level=True)


def test_figures_are_those_of_the_script(tmp_path):
    script = [sys.executable, str(FIGURES / "make_figures.py"), str(tmp_path)]
    subprocess.run(script, check=True, timeout=120)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == {path.name for path in FIGURES.glob("*.svg")}

    def words(svg: str) -> list[str]:  # versions of matplotlib differ in the rest
        return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)

    for name, svg in drawn.items():
        assert words(svg) and words(svg) == words((FIGURES / name).read_text())
        shown = [p for p in (ROOT / "docs").glob("*.md") if f"figures/{name}" in p.read_text()]
        assert shown, f"no page shows {name}"
