"""Files that a training run leaves, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vidshard.jobs.training.recorder import png

HOSTILE = "<img src=x onerror=alert(1)>"
"""Name of a video of the run."""
SECRET = "hunter2hunter2"
"""Part of an address of the run."""


def write_training_files(out: Path) -> Path:
    """Write the files of a run of two stages, of which one is finished, into a folder; returns the folder."""
    stage = out / "stage1"
    (stage / "pictures").mkdir(parents=True)
    record: dict[str, Any] = {"stages": {"stage1": {"steps": 20}, "stage2": {"steps": 5}}, "videos": [HOSTILE]}
    record["init_from"] = f"https://host/x.ckpt?sig={SECRET}"
    (out / "run.json").write_text(json.dumps({"format": 1, "run": record, "tokenizer": {"name": "tiny"}, "starts": []}))
    result = {"name": "stage1", "steps": 20, "is_finished": True, "seconds": 100.0, "restarts": 1, "unmeasured": ""}
    measured = {"before": {"psnr": 10.0}, "measured": {"psnr": 21.5}, "metrics": {"clips_per_second": 3.0}}
    measured["made"] = {"mirrored": 1234, "native": 5678}
    (stage / "result.json").write_text(json.dumps(result | measured))
    figures = {"clips_per_second": 3.0, "clips_mirrored": 2, "clips_native": 4}
    lines = [{"step": step, "group": "train", "loss": 1 / step, **figures} for step in range(1, 21)]
    lines += [{"step": step, "group": "held_out", "psnr": 10.0 + step} for step in (0, 20)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (stage / "metrics.jsonl").write_text(text + '{"step": 21, "gro')  # which a kill cut off
    (stage / "pictures" / "step-00000020.png").write_bytes(png(np.zeros((8, 24, 3), np.uint8)))
    (out / "rejects.json").write_text(json.dumps([{"uri": HOSTILE, "reason": "truncated", "detail": HOSTILE}]))
    return out
