"""Stored clips back to frames."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.models import EACH_VARIANT, model_of
from vidshard.models.vidtok.lengths import Padding
from vidshard.pipeline.encode import encode_clips
from vidshard.pipeline.output.shard_reader import StoredClip
from vidshard.pipeline.reconstruct import reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_stored_clips_of_every_length_are_reconstructed_as_long_as_they_were(name: str) -> None:
    model = model_of(name)
    config = model.config
    height, width = config.space_stride, 2 * config.space_stride
    for num_frames in range(1, 41):
        padding = list(Padding)[num_frames % 2]
        (column,) = payload = config.payload(config.valid_frames(num_frames), height, width)
        frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), np.uint8)
        (values,) = encode_clips(model, [frames], payload, batch_size=1, padding=padding).values()
        times = {"frame_pts_seconds": [0.0] * num_frames}
        clip = StoredClip(values=times, payload={column.name: values[0].reshape(column.shape)})
        assert reconstruct(clip, model, padding=padding).shape == frames.shape
