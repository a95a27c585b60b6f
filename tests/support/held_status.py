"""A board at which training workers wait, at steps where a test wants to kill one, until it has.

So a kill comes at these steps on any machine. A module of its own, as each worker loads it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidshard.jobs.training.status import RunStatus


class HeldStatus(RunStatus):
    """Notes of who waits and who may go on are files in a folder."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        super().__init__()
        self.folder = folder
        self.steps = tuple(steps)

    def show(self, latest: Mapping[str, Any]) -> bool:
        """As ever, later."""
        step = latest["step"]
        if step in self.steps:
            (self.folder / f"waits-at-{step}").touch()
            while not (self.folder / f"goes-on-at-{step}").exists():
                time.sleep(0.01)
        return super().show(latest)
