"""Golden values of autoencoders of diffusers: their file, and the values of the installed version."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.support.vae_configs import clips, config_of, side_of, vae_of

_FOLDER = Path(__file__).parents[1] / "models" / "diffusers_vae" / "golden"
_MOST_VALUES = 128


def golden_path() -> Path:
    """File of the installed version."""
    return _FOLDER / f"diffusers-{importlib.metadata.version('diffusers')}.npz"


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
