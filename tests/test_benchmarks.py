"""Benchmarks that run where not everything is installed."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "av", "click", "fsspec", "tenacity", "yaml", "huggingface_hub", "s3fs"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from benchmarks import gpu
bench = gpu.Bench(11, None)
gpu.job(bench)
clips = gpu.natural_clips(2, 32)
assert clips.shape == (2, 17, 32, 32, 3) and clips.std() > 20, clips.std()
assert gpu.trained("cpu", "float16").dtype is torch.float16
assert sum(seconds for _, seconds in gpu.SECTIONS.values()) <= 11 * 60
sys.argv = ["gpu", "--minutes", "1"]
torch.cuda.is_available = lambda: False
gpu.main()
"""


def test_the_script_for_a_gpu_needs_neither_ray_nor_pyav_and_says_why_it_cannot_run() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert "job: skipped: -  needs av" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "benchmarks.gpu needs a GPU: PyTorch sees no GPU" in done.stderr
