"""What the verbs share: a progress bar that stays off standard output."""

from __future__ import annotations

import pytest

from ahn.cli import common


def test_progress_stays_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress() as bar:
        bar.advance(bar.add_task("reading", total=2))
    assert capsys.readouterr() == ("", "")  # nor an empty line in a log
