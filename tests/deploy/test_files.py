"""Files that deploy vidshard: linted, held against KubeRay's own schema, and true to this repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.commands import check_command
from tests.support.markdown import ROOT
from vidshard.schemas.runs import TokenizeRun

DEPLOY = ROOT / "deploy"
SCHEMA = ROOT / "tests/fixtures/kuberay/rayjob.v1.openapi.json"


def _run_tool(name: str, *arguments: object) -> str:
    """Output of a linter of the dev environment; empty if it has no objection."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        pytest.skip(f"{name} has no wheel for this platform")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def _strict(schema: Any) -> Any:
    """The schema with every object closed, as a misspelt field is otherwise dropped without a word."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if closed.pop("x-kubernetes-int-or-string", False):
        closed = {"type": ["integer", "string"]}
    return closed


@cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(_strict(json.loads(SCHEMA.read_text())))


def _ray_job() -> dict[str, Any]:
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert isinstance(job, dict)
    return job


def _refusals(job: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in _validator().iter_errors(job)]


def _pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_ray_job_fits_the_schema_of_kuberay() -> None:
    assert _refusals(_ray_job()) == []


def test_a_misspelt_field_or_a_wrong_type_does_not_fit_the_schema_of_kuberay() -> None:
    job = _ray_job()
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriod"] = 60
    job["spec"]["backoffLimit"] = "three"
    refusals = " ".join(_refusals(job))
    assert "'terminationGracePeriod' was unexpected" in refusals
    assert "$.spec.backoffLimit: 'three' is not of type 'integer'" in refusals


def test_the_ray_job_runs_a_command_that_exists_with_the_version_of_ray_in_the_image() -> None:
    job = _ray_job()
    command = job["spec"]["entrypoint"].split(" --config ")[0]
    check_command(command)
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def test_pods_end_later_than_a_run_that_was_asked_to() -> None:
    grace = TokenizeRun.model_fields["grace_seconds"].default
    for pod in _pods(_ray_job()):
        assert pod["terminationGracePeriodSeconds"] > grace


def test_pods_have_shared_memory_no_privileges_and_no_secret_in_the_file() -> None:
    for pod in _pods(_ray_job()):
        assert pod["securityContext"]["runAsNonRoot"]
        [container] = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "env" not in container
        assert all(set(source) == {"secretRef"} for source in container["envFrom"])
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_head_of_the_ray_job_computes_nothing_but_the_driver() -> None:
    head = _ray_job()["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_the_dockerfile_has_no_fault_that_hadolint_finds() -> None:
    assert _run_tool("hadolint", "--no-color", ROOT / "Dockerfile") == ""


def test_the_image_is_pinned_unprivileged_and_answers_the_health_probes_of_kuberay() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"(?m)^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text)
    assert re.search(r"(?m)^USER 1000:1000$", text)
    assert {"tini", "wget"} <= set(text.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [installed] = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert any(name.startswith("ray[default]") for extra in installed.split(",") for name in extras[extra])


def test_every_file_that_the_image_copies_is_sent_to_the_builder_and_nothing_else() -> None:
    copied = {
        word for line in re.findall(r"(?m)^COPY (.+)$", (ROOT / "Dockerfile").read_text()) for word in line.split()[:-1]
    }
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("name", ["slurm.sh"])
def test_scripts_have_no_fault_that_shellcheck_finds(name: str) -> None:
    assert _run_tool("shellcheck", DEPLOY / name) == ""


def test_the_commands_in_the_head_of_each_file_exist() -> None:
    found = set()
    for path in DEPLOY.iterdir():
        head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        for command in re.findall(r"(?:-- \\\n#\s+|slurm\.sh )((?:vidshard )?tokenize .*)", head):
            check_command(command if command.startswith("vidshard") else f"vidshard {command}")
            found.add(path.name)
    assert found == {"slurm.sh", "runtime_env.yaml"}


def test_the_script_of_skypilot_ends_no_ray_but_its_own() -> None:
    job = yaml.safe_load((DEPLOY / "sky.yaml").read_text())
    assert "ray stop" not in job["run"]
    check_command(next(line for line in job["run"].splitlines() if line.startswith("vidshard ")))
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n"], input=job["run"], text=True, timeout=30, check=False).returncode == 0
    runtime = yaml.safe_load((DEPLOY / "runtime_env.yaml").read_text())
    assert runtime["pip"]["packages"] == ["vidshard"]
