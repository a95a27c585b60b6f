"""Make the golden values of the installed diffusers: ``python -m tests.models.diffusers_vae.golden.remake``.

Each tiny configuration encodes and decodes one clip of noise with the random weights of seed 0. The file has a few
hundred values of each result, in float32, by diffusers version.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.support.vae_configs import CONFIGS, clips, config_of, side_of, vae_of

LATENTS = "tests.models.diffusers_vae.golden.remake"
_MOST_VALUES = 128


def golden_path() -> Path:
    """File of the installed version."""
    return Path(__file__).with_name(f"diffusers-{importlib.metadata.version('diffusers')}.npz")


def summary(name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Some values of the mean, the log-variance and the frames of a clip."""
    config, vae = config_of(name), vae_of(name)
    num_frames = config.valid_frames(2)
    with torch.inference_mode():
        encoded = vae.encode(clips(1, num_frames, side_of(config)))
        results = encoded.payload | {"frames": vae.decode_payload(encoded.payload, num_frames)}
    return {key: _some(values) for key, values in results.items()}


def _some(values: torch.Tensor) -> npt.NDArray[np.float32]:
    flat = values.flatten().numpy().astype(np.float32)
    return flat[:: -(-len(flat) // _MOST_VALUES)]


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    kept = {f"{name}/{key}": values for name in CONFIGS for key, values in summary(name).items()}
    np.savez_compressed(golden_path(), allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
