"""Table of the layouts that `vidshard export --to` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vidshard.jobs.export.fastvideo import FastVideo
from vidshard.jobs.export.lance import Lance
from vidshard.jobs.export.layout import Layout
from vidshard.jobs.export.lerobot_latents import LeRobotLatents
from vidshard.jobs.export.webdataset import WebDataset

LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "fastvideo": FastVideo,
    "lance": Lance,
    "webdataset": WebDataset,
    "lerobot-latents": LeRobotLatents,
}
"""Class of each layout, by its name in the command."""
