"""Compiled encoders: ``torch.compile`` of the network for fixed shapes, with one cache for many encoders.

Compiling takes minutes for each shape, so results are kept in a folder whose parts are named after the model, its
precision, the GPU with the version of torch, and the clips and batch. Of the encoders that share the folder, the
first one that needs a shape compiles it while the others wait at a lock, and then load it. A folder on a file system
that all nodes mount serves all of them.

Whether this is faster than the kernels of `models.vidtok.fused` was not measured yet; `benchmarks.gpu` measures both.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vidshard.models.tokenizer import Tokenizer
from vidshard.models.vidtok.model import VidTok

_MOST_SHAPES = 256
"""Shapes that one encoder compiles: frame sizes times batch sizes. PyTorch stops at 8 unless told otherwise."""


def compile_encoder(tokenizer: Tokenizer, backend: str = "inductor") -> None:
    """Let PyTorch compile the encoder, each shape in its first pass, in place.

    Args:
        backend: name of a compiler of ``torch.compile``.

    Raises:
        ValueError: the tokenizer is of another family than VidTok.
    """
    if not isinstance(tokenizer, VidTok):
        raise ValueError(f"{tokenizer.config.name}: only encoders of the VidTok family are compiled")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    # fullgraph: a break would leave a part of the network slow without a word
    tokenizer.encoder.compile(fullgraph=True, dynamic=False, backend=backend)


class CompileCache:
    """Folder of compiled encoders, of which an encoder uses one part for each shape.

    Args:
        root: folder; made if it does not exist.
        model: name of the model, with its precision.
    """

    def __init__(self, root: str, model: str) -> None:
        self._folder = Path(root) / _plain(model) / _plain(_device_name())
        self._known: set[str] = set()

    @contextmanager
    def passes(self, num_frames: int, size: tuple[int, int], batch_size: int) -> Iterator[None]:
        """Passes over clips of one shape: the first ones of an encoder hold the lock of the shape.

        Args:
            size: height and width.
        """
        name = f"{num_frames}x{size[0]}x{size[1]}-batch-{batch_size}"
        folder = self._folder / name
        if name in self._known:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        for variable, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ[variable] = str(folder / part)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        self._known.add(name)


def default_compile_cache() -> str:
    """Folder for compiled encoders of this user."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(root) / "vidshard" / "compiled")


def _device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{name} torch {torch.__version__}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-")
