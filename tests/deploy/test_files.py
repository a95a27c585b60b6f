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
from vidshard.schemas.errors import EXIT_AGAIN
from vidshard.schemas.runs import TokenizeRun

DEPLOY = ROOT / "deploy"
DOCS = "docs/deploying.md"
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


def test_a_head_that_is_deleted_stops_the_job_and_waits_for_it_before_ray_ends() -> None:
    [head] = _pods(_ray_job())[0]["containers"]
    command = head["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["python3", "-c"]
    compile(command[2], "preStop", "exec")  # tests/deploy/test_job_submit.py runs it
    [wait] = [int(each["value"]) for each in head["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    grace = TokenizeRun.model_fields["grace_seconds"].default
    assert grace < wait < _pods(_ray_job())[0]["terminationGracePeriodSeconds"]


def test_a_refused_run_starts_no_node_of_kuberay() -> None:
    job = _ray_job()
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
    assert "--wait-for-gpus" in job["spec"]["entrypoint"]


def test_schedulers_start_again_after_the_exit_codes_of_the_table_that_say_so_and_no_others() -> None:
    rows = re.findall(r"(?m)^\| ([1-9]\d*) \| .+ \| (.*) \|$", (ROOT / DOCS).read_text())
    again = {int(code) for code, what in rows if what.startswith("start it again")}
    assert {int(code) for code, _ in rows} - again == {1, 2}
    assert again == {EXIT_AGAIN, 129, 130, 137, 143}
    recovery = yaml.safe_load((DEPLOY / "sky.yaml").read_text())["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    by_hand = {130}  # Ctrl-C, which no scheduler sends
    assert set(recovery["recover_on_exit_codes"]) == again - by_hand
    cases = re.findall(r"(?m)^    ([\d |]+)\) again=(?:1|\$)", (DEPLOY / "slurm.sh").read_text())
    assert {int(code) for case in cases for code in case.split("|")} == again - by_hand


def test_pods_have_shared_memory_no_privileges_and_no_secret_in_the_file() -> None:
    for pod in _pods(_ray_job()):
        assert pod["securityContext"]["runAsNonRoot"]
        [container] = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {each["name"] for each in container.get("env", ())} <= {"RAY_JOB_STOP_WAIT_TIME_S"}
        assert all(set(source) == {"secretRef"} for source in container["envFrom"])
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_pods_have_the_share_of_their_memory_as_shared_memory_that_the_docs_name() -> None:
    [percent] = re.findall(r"Frames pass through `/dev/shm`. Give it (\d+) % of the memory", (ROOT / DOCS).read_text())
    for pod in _pods(_ray_job()):
        [container] = pod["containers"]
        memory = container["resources"]["limits"]["memory"]
        [shared] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shared["medium"] == "Memory"
        share = int(shared["sizeLimit"].removesuffix("Gi")) / int(memory.removesuffix("Gi"))
        assert int(percent) / 100 <= share < 0.5


def test_the_head_of_the_ray_job_computes_nothing_but_the_driver() -> None:
    head = _ray_job()["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_the_dockerfile_has_no_fault_that_hadolint_finds() -> None:
    assert _run_tool("hadolint", "--no-color", ROOT / "Dockerfile") == ""


def test_the_image_is_pinned_unprivileged_and_answers_the_health_probes_of_kuberay() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"(?m)^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text)
    assert re.search(r"(?m)^ARG RUN_AS=1000:1000\nUSER \$\{RUN_AS\}$", text)
    assert {"tini", "wget"} <= set(text.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [installed] = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert any(name.startswith("ray[default]") for extra in installed.split(",") for name in extras[extra])


def test_only_the_image_with_cuda_speaks_to_the_toolkit_of_nvidia() -> None:
    stages = re.split(r"(?m)^FROM ", (ROOT / "Dockerfile").read_text())[1:]
    named = {stage.splitlines()[0].split(" AS ")[-1]: stage for stage in stages}
    assert list(named) == ["base", "cpu", "cuda", "${VARIANT}"]
    assert [name for name, stage in named.items() if "NVIDIA_" in stage] == ["cuda"]
    assert "download.pytorch.org/whl/cpu" in named["cpu"]


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
    [command] = re.findall(r"RAY_ADDRESS=\S+ (vidshard .*?) \|\|", job["run"])
    check_command(command)
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n"], input=job["run"], text=True, timeout=30, check=False).returncode == 0
    assert "docker build" in (DEPLOY / "sky.yaml").read_text()
    assert "RUN_AS=0:0" in (DEPLOY / "sky.yaml").read_text()
    runtime = yaml.safe_load((DEPLOY / "runtime_env.yaml").read_text())
    assert runtime["pip"]["packages"] == ["vidshard"]
