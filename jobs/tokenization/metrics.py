"""Metrics of a tokenization run, through Ray's own exporter: Prometheus scrapes them from the node of the driver.

Each is named ``ray_vidshard_...`` there, counters with ``_total``. Queues between the stages are metrics of Ray Data
(``ray_data_...``). `deploy/grafana.json` is a dashboard of all of them. A Ray without ``ray[default]``, as one of our
own, exports nothing, and a run with ``--local`` has none.
"""

from __future__ import annotations

from collections.abc import Mapping

COUNTERS: Mapping[str, str] = {
    "videos_in": "Videos of the inputs.",
    "video_seconds_in": "Seconds of video that the plan expects, those that earlier runs finished left out.",
    "videos_tokenized": "Videos whose last span came out.",
    "video_seconds_tokenized": "Seconds of video in the clips that came out.",
    "rejections": "Rejected spans and videos, by reason.",
    "clips": "Clips that came out; those that are done again after the loss of a writer count twice.",
    "tokens": "Tokens, or latent values, in committed shards.",
    "bytes": "Bytes of committed shards.",
    "shards": "Committed shards.",
    "decode_seconds": "Core seconds of decoding.",
    "encode_seconds": "Seconds of encoders at work.",
    "encode_wait_seconds": "Seconds of encoders that waited for frames.",
}
GAUGES: Mapping[str, str] = {
    "spans_left": "Spans that have not come out yet.",
    "clips_uncommitted": "Clips that came out and are in no committed shard yet.",
    "writer_lag_seconds": "Age of the oldest clip that came out and is in no committed shard yet.",
    "encoders": "Encoders that the run began with.",
}


class RunMetrics:
    """Metrics of one run. Without a Ray that exports them, all methods do nothing."""

    def __init__(self, *, out: str, is_exported: bool) -> None:
        """Register the metrics.

        Args:
            out: output of the run without credentials, the tag ``output`` of each metric.
            is_exported: whether this process has joined a Ray that exports metrics.
        """
        self._tags = {"output": out}
        self._metrics: dict[str, object] = {}
        if is_exported:
            from ray.util.metrics import Counter, Gauge

            for kind, names in ((Counter, COUNTERS), (Gauge, GAUGES)):
                for name, text in names.items():
                    keys = ("output", "reason") if name == "rejections" else ("output",)
                    self._metrics[name] = kind(f"vidshard_{name}", text, keys)

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Add to a counter; an amount of 0 or less is left out, as Ray refuses it."""
        metric = self._metrics.get(name)
        if metric is not None and amount > 0:
            metric.inc(amount, self._tags | tags)  # type: ignore[attr-defined]

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        metric = self._metrics.get(name)
        if metric is not None:
            metric.set(value, self._tags)  # type: ignore[attr-defined]
