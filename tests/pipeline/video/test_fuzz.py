"""A small share of ``python -m tests.support.fuzz``."""

from __future__ import annotations

from pathlib import Path

from tests.support.fuzz import fuzz


def test_damaged_files_give_clips_or_a_reason_and_the_decoder_survives_them(tmp_path: Path) -> None:
    outcome = fuzz(150, 1, tmp_path)
    found = {what for _, what in outcome.reasons}
    assert outcome.reasons.total() == 150
    assert {"clips", "decode_error"} <= found
    assert not {"decoder_crashed", "decode_timeout"} & found, outcome.reasons
