"""What a program printed, as a picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_is_shown_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    out, said = tmp_path / "screen.svg", "\x1b[1mbold\x1b[0m & plain\n" + "x" * 120
    script = ROOT / "benchmarks/screen.py"
    subprocess.run([sys.executable, script, "a title", out], input=said, text=True, check=True, encoding="utf-8")
    drawn = out.read_text(encoding="utf-8").replace("&#160;", " ")
    assert all(text in drawn for text in ("a title", ">bold<", "&amp; plain", "x" * 120))
    assert "url(http" not in drawn and "font-face" not in drawn and "href" not in drawn
