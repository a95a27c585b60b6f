"""Versions of the code and of the libraries that made an output."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import av
import pyarrow as pa
import torch


@cache
def code_version() -> str:
    """Version of vidshard; in a checkout followed by ``+`` and the commit."""
    version = importlib.metadata.version("vidshard")
    commit = os.environ.get("VIDSHARD_COMMIT", "")
    root = Path(__file__).resolve().parents[1]
    if not commit and (root / ".git").exists():
        git = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            commit = ""
    return f"{version}+{commit}" if commit else version


def library_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions, by name, of Python and of the libraries that compute and store frames and tokens.

    Args:
        more: packages of the tokenizer; one that is not installed is left out.
    """
    found = {}
    for name in more:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of torch, whose pickle would load torch in every process
        "ray": importlib.metadata.version("ray"),
        "pyarrow": pa.__version__,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "libswscale": ".".join(map(str, av.library_versions["libswscale"])),
        **found,
    }
