"""Complete runs as functions: read one to know what it does, change it by ``model_copy(update=...)``."""

from __future__ import annotations

from schemas.runs import TokenizeRun


def cpu_demo(videos: list[str], out: str) -> TokenizeRun:
    """The tiny model with seeded random weights at 128x128: shows that the machine works, in a minute on two cores."""
    return TokenizeRun(inputs=videos, out=out, tokenizer="tiny", random_weights=0, size=(128, 128), resize="crop")
