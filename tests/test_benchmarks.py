"""Benchmarks that run where not everything is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import decoding_costs, decoding_faults
from benchmarks.contender import Elsewhere, Passes
from benchmarks.gpu import SECTIONS
from benchmarks.sections import Rows, Section, Supervisor, run_here
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "av", "click", "fsspec", "tenacity", "yaml", "huggingface_hub", "s3fs"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

WITHOUT = f"""{MISSING}
import torch
from benchmarks import gpu
gpu.job(gpu.Rows("job"))
clips = gpu.natural_clips(2, 32)
assert clips.shape == (2, 17, 32, 32, 3) and clips.std() > 20, clips.std()
assert gpu.trained("cpu", "float16").dtype is torch.float16
assert sum(section.seconds for section in gpu.SECTIONS.values()) <= 11 * 60
sys.argv = ["gpu", "--minutes", "1"]
torch.cuda.is_available = lambda: False
gpu.main()
"""


def test_the_script_for_a_gpu_needs_neither_ray_nor_pyav_and_says_why_it_cannot_run() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert '"skipped", "value": "-", "unit": "", "note": "needs av"' in done.stdout, done.stderr
    assert done.returncode == 1
    assert "benchmarks.gpu needs a GPU, or --dry: PyTorch sees no GPU" in done.stderr


CHILD = """
import json, os, sys
def say(kind, value):
    print("\\x1evidshard " + json.dumps([kind, value]), flush=True)
print("a line of a library")
for name in sys.argv[1].split(","):
    say("begin", name)
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        import threading
        threading.Event().wait()
    say("row", {"section": name, "what": "time", "value": 1.0, "unit": "s", "note": ""})
    say("end", name)
"""


def test_a_section_that_dies_or_hangs_costs_none_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    supervisor = Supervisor("test", [sys.executable, "-c", CHILD], minutes=60, json_path=str(path))
    limits = {"first": 300.0, "dies": 300.0, "second": 300.0, "hangs": 0.1, "third": 300.0, "long": 10_000.0}
    rows = supervisor.supervise(limits)
    assert [(row["section"], row["what"]) for row in rows] == [
        ("first", "time"),
        ("dies", "failed"),
        ("second", "time"),
        ("hangs", "stopped"),
        ("third", "time"),
        ("long", "skipped"),
    ]
    assert "code 7" in str(rows[1]["note"])
    assert json.loads(path.read_text())["rows"] == rows


def test_a_section_that_raises_is_a_row(capfd: pytest.CaptureFixture[str]) -> None:
    def fails(rows: Rows) -> None:
        rows.add("fails", "before", 1.0, "s")
        raise ValueError("of two\nlines")

    freed: list[None] = []
    run_here({"fails": Section(fails, 1)}, ["fails"], after_failure=lambda: freed.append(None))
    said = capfd.readouterr().out
    assert said.index('"before"') < said.index("ValueError: of two lines")
    assert len(freed) == 1


@pytest.mark.parametrize("only", ["versions", pytest.param("", marks=pytest.mark.slow)])
def test_the_script_for_a_gpu_runs_dry_without_ray_and_pyav(only: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--json", str(tmp_path / "gpu.json"), "--only", only]
    paths = f"{tmp_path}{os.pathsep}{Path.cwd()}"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    expected = only.split(",") if only else [name for name, section in SECTIONS.items() if not section.needs_gpu]
    assert list(dict.fromkeys(row["section"] for row in rows)) == expected
    assert [row for row in rows if row["what"] in ("failed", "stopped", "skipped")] == []


def allocator_settings() -> Passes:
    found = torch.tensor([float(name in os.environ) for name in ENCODER_ENVIRONMENT])
    return {"encode": lambda: found, "decode": lambda: 1 - found}


@pytest.mark.slow  # starts a process that imports torch and Ray
def test_an_implementation_elsewhere_runs_without_the_settings_of_the_jobs_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ENCODER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    process = Elsewhere(allocator_settings)
    assert process.measure("encode", anew=False).output.sum() == 0
    assert process.measure("decode", anew=False).output.sum() == len(ENCODER_ENVIRONMENT)
    assert all(os.environ[name] == value for name, value in ENCODER_ENVIRONMENT.items())


@pytest.mark.parametrize(
    ("command", "names"),
    [(decoding_costs.main, set(decoding_costs.SECTIONS)), (decoding_faults.main, set(decoding_faults.KINDS))],
    ids=["costs", "faults"],
)
def test_the_figures_of_decoding_are_printed(command: click.Command, names: set[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--quick", "--json", str(tmp_path / "rows.json")], catch_exceptions=False)
    assert done.exit_code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row.get("section", row.get("kind")) for row in rows} == names
    for row in rows:
        assert "wrong" not in row.get("outcomes", ""), row
        assert "suspected" not in row.get("outcomes", "").replace("not suspected", ""), row
        assert row["value"] > 0 if row.get("section") == "child" else True, row  # forks of a child count too
