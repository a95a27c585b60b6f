"""Make ``reference.npz`` anew: the arrays of the original's values that every run compares, in float32.

    python tests/models/vidtwin/golden/remake.py FOLDER

``FOLDER`` is the whole set of reference values, which is not part of the project. The arrays are those of two tiny
models: latents, reconstructions whole, by part and crossed, and the probes of the norms' epsilon.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

NAMES = ("A/enc/z", "s/moments", "dx/moments", "dy/moments", "kl_terms", "A/video", "cross/video", "eps/")


def main(folder: Path) -> None:
    """Write the file beside this one."""
    kept = {}
    for model in ("tiny_a", "tiny_b"):
        with np.load(folder / f"vidtwin_{model}.npz") as arrays:
            for key in arrays.files:
                if any(name in key for name in NAMES) and "stats" not in key:
                    kept[f"{model}/{key}"] = arrays[key].astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("reference.npz"), allow_pickle=False, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
