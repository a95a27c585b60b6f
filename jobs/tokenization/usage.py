"""Use of the machines by a run: hours of video per hour of a GPU or CPU, and the stage that the run waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WAITING_SHARE = 0.2
"""Share of their time that encoders may wait for frames before decoding counts as the limit."""
WRITING_SHARE = 0.8
"""Share of the phase that the writers' threads may be busy before they count as the limit."""
STARTING_SHARE = 0.5
"""Share of the phase that encoders may take to start before their start counts as the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Times of the phase in which a run decodes and encodes, and the machines that it had."""

    video_seconds: float
    """Seconds of source video in the clips that came out."""
    seconds: float
    """Wall time of the phase."""
    encode_seconds: float
    """Summed over all encoders."""
    wait_seconds: float
    """Time that encoders waited for frames, summed over all of them."""
    decode_seconds: float
    """Core-seconds of decoding, summed over all decoders."""
    write_seconds: float
    encoders: int
    gpus: float
    """GPUs that the encoders had; 0 on CPUs."""
    cpus: int
    """CPUs of all machines."""
    encoder_cpus: float
    """CPUs that were reserved for encoders."""
    decode_workers: int | None = None
    """Limit of decoders that run at once; None without one."""
    is_local: bool = False
    """Whether one process decoded and encoded in turns."""
    precision: str
    bfloat16_pays: bool = False
    """Whether the CPU and the network would be faster in bfloat16."""

    @property
    def busy_share(self) -> float:
        """Share of the phase in which encoders computed."""
        return min(1.0, self.encode_seconds / (self.encoders * self.seconds)) if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the encoders' time that they waited for frames, their start left out."""
        total = self.encode_seconds + self.wait_seconds
        return self.wait_seconds / total if total else 0.0

    @property
    def cores_needed(self) -> float:
        """Cores that decoders need to keep the encoders busy."""
        per_encoder = self.encode_seconds / self.encoders
        return self.decode_seconds / per_encoder if per_encoder else 0.0

    @property
    def cores_there(self) -> float:
        """Cores that are left for decoders."""
        return max(1.0, self.cpus - self.encoder_cpus)

    @property
    def yields(self) -> str:
        """Hours of source video per hour of a GPU, and of a CPU."""
        texts = []
        if self.gpus:
            texts.append(f"{self.video_seconds / (self.gpus * self.seconds):.3g} hours of video per GPU-hour")
        texts.append(f"{self.video_seconds / (self.cpus * self.seconds):.3g} per CPU-hour")
        if not self.gpus:
            texts[0] = texts[0].replace(" per", " hours of video per")
        return ", ".join(texts)

    @property
    def verdict(self) -> str:
        """The stage that the run waited for, in one sentence, with the setting that would change it."""
        match self.limit:
            case "start":
                return (
                    "waited for the encoders' start: a larger corpus, or fewer --encode-workers, would use the "
                    "machines better"
                )
            case "writers":
                return "waited for the writers, one on each node of encoders: add nodes, or use faster storage"
            case "decoders":
                return f"waited for decoders: {self._cores()}"
            case "encoders":
                return f"waited for encoders: {self._faster()}"

    @property
    def limit(self) -> Literal["start", "writers", "decoders", "encoders"]:
        """The stage that the run waited for; ``start`` is that of the encoders."""
        if self.encode_seconds + self.wait_seconds < (1 - STARTING_SHARE) * self.encoders * self.seconds:
            return "start"
        if self.write_seconds > WRITING_SHARE * self.seconds:
            return "writers"
        return "decoders" if self.wait_share > WAITING_SHARE else "encoders"

    def _cores(self) -> str:
        units = self.gpus or self.encoders
        unit = "GPU" if self.gpus else "encoder"
        needed, there = self.cores_needed / units, self.cores_there / units
        remedy = "add CPU nodes" if self.gpus else "add CPUs"
        if needed <= there:
            if self.is_local:
                return "--local decodes and encodes in turns; leave it out to do both at once"
            if self.decode_workers is not None and self.decode_workers < self.cores_there:
                return f"{needed:.2g} cores for each {unit} would do, {there:.2g} were there; raise --decode-workers"
            return (
                f"{needed:.2g} cores for each {unit} would do, {there:.2g} were there, so it was for the first frames "
                "or the last videos; a larger corpus would keep encoders busy"
            )
        return f"{needed:.2g} cores for each {unit} are needed, {there:.2g} were there; {remedy}, or lower --fps"

    def _faster(self) -> str:
        if self.gpus:
            faster = ", or --precision float16 and another --out" if self.precision in ("float32", "tf32") else ""
            return f"add GPUs{faster}"
        if self.bfloat16_pays:
            return (
                "add CPUs or a GPU, or --precision bfloat16 and another --out: this CPU computes faster with it, some "
                "twice as fast, and other tokens come out"
            )
        return "add CPUs, or a GPU"
