"""Make the golden values of the installed diffusers: ``python -m tests.models.diffusers_vae.golden.remake``.

Each tiny configuration encodes and decodes one clip of noise with the random weights of seed 0. The file has a few
hundred values of each result, in float32, by diffusers version.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.support.vae_configs import CONFIGS
from tests.support.vae_golden import golden_path, summary


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    kept = {f"{name}/{key}": values for name in CONFIGS for key, values in summary(name).items()}
    np.savez_compressed(golden_path(), allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
