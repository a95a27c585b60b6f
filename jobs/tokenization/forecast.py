"""Forecast of a run: what its output will hold and what it will cost, and its comparison with the run afterwards."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import FORECAST_FILE
from vidshard.schemas.text import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Expectation of `vidshard plan` for a run."""

    videos: int
    rejected_videos: int
    """Videos that cannot be opened, or of whose sample nothing decodes."""
    video_seconds: float
    """Seconds of source video in the clips."""
    header_clips: int
    """Clips by the headers of the videos."""
    clips: int
    """Clips that are expected; all that decode where every span was tried."""
    is_every_span_tried: bool
    output_bytes: int
    """Bytes of all shards."""
    shards: int
    encode_hours: float
    """GPU-hours, or core-hours on CPUs, of encoding."""
    decode_hours: float
    """Core-hours of decoding."""
    is_gpu: bool
    cores_needed: float
    """Cores for each GPU, or for each core of an encoder, that decoding needs."""
    run_seconds: float | None
    """Wall time of the command on this machine; None for another machine."""
    machine: str
    """The machine in words, with where its speeds come from."""
    machine_speed: float | None = None
    """Speed of this machine while it was measured (`calibration`); None for GPUs, clusters and other machines."""

    def save(self, out: str) -> None:
        """Write ``forecast.json`` into an output."""
        record = json.dumps(asdict(self), indent=2).encode()
        storage.write_atomic(storage.join(out, FORECAST_FILE), record)

    @classmethod
    def of_output(cls, out: str) -> Forecast | None:
        """Read ``forecast.json`` of an output; None if there is none that this version wrote."""
        path = storage.join(out, FORECAST_FILE)
        if not storage.exists(path):
            return None
        try:
            record: dict[str, Any] = json.loads(storage.read_bytes(path, max_bytes=1 << 20))
            return cls(**record)
        except (ValueError, TypeError):
            return None

    def compared(self, clips: int, output_bytes: int, seconds: float, machine_speed: float | None = None) -> str:
        """Compare with what came out, in one line.

        Args:
            clips: clips written.
            output_bytes: bytes of all shards.
            seconds: wall time of the command.
            machine_speed: speed of this machine during the run; None if it was not measured.
        """
        texts = [
            f"{counted(self.clips, 'clip')}, {clips:,} came",
            f"{self.output_bytes:,} bytes, {output_bytes:,} came ({_ratio(output_bytes, self.output_bytes)})",
        ]
        if self.run_seconds is not None:
            took = f"{self.run_seconds:.0f} s, it took {seconds:.0f} ({_ratio(seconds, self.run_seconds)})"
            if self.machine_speed and machine_speed:
                slower = self.machine_speed / machine_speed
                expected = self.run_seconds * slower
                took += f"; at the machine's speed of then, {1 / slower:.2f} times, {_ratio(seconds, expected)}"
            texts.append(took)
        return "; ".join(texts)


def _ratio(actual: float, expected: float) -> str:
    return f"{actual / expected:.2f} times" if expected else "none were expected"
