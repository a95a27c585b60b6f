"""The dashboard, the metrics that it asks for, and a Prometheus that scrapes a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.support.held_back import held_back
from tests.support.markdown import ROOT
from tests.support.processes import COMMITTED_AT_ONCE, RUN, inputs
from vidshard.jobs.tokenization.metrics import COUNTERS, GAUGES, RunMetrics

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
OURS = {f"ray_vidshard_{name}_total" for name in COUNTERS} | {f"ray_vidshard_{name}" for name in GAUGES}


class Closed(BaseModel):
    """A part of Grafana's dashboard schema (version 39) with the fields that Grafana knows, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DataSource(Closed):
    type: str
    uid: str


class GridPos(Closed):
    h: int = Field(gt=0)
    w: int = Field(gt=0, le=24)
    x: int = Field(ge=0, lt=24)
    y: int = Field(ge=0)


class Target(Closed):
    refId: str = Field(pattern="^[A-Z]$")  # noqa: N815  Grafana's name
    datasource: DataSource
    expr: str = Field(min_length=1)
    legendFormat: str  # noqa: N815
    range: bool = False
    instant: bool = False


class FieldConfig(Closed):
    class Defaults(Closed):
        unit: str
        min: float | int | None = None
        max: float | int | None = None

    defaults: Defaults
    overrides: list[dict[str, Any]]


class Panel(Closed):
    id: int
    type: Literal["timeseries", "stat"]
    title: str = Field(min_length=1)
    description: str
    datasource: DataSource
    gridPos: GridPos  # noqa: N815
    fieldConfig: FieldConfig  # noqa: N815
    options: dict[str, Any]
    targets: list[Target] = Field(min_length=1)


class Variable(Closed):
    type: Literal["query", "datasource"]
    name: str
    label: str
    query: str
    datasource: DataSource | None = None
    refresh: Literal[0, 1, 2] = 0
    sort: int = Field(0, ge=0, le=8)
    multi: bool = False
    includeAll: bool = False  # noqa: N815
    allValue: str | None = None  # noqa: N815


class Dashboard(Closed):
    class Range(Closed):
        from_: str = Field(alias="from")
        to: str

    class Variables(Closed):
        list: list[Variable]

    class Annotations(Closed):
        list: list[dict[str, Any]]

    uid: str = Field(min_length=8, max_length=40)
    title: str
    description: str
    tags: list[str]
    timezone: str
    editable: bool
    graphTooltip: Literal[0, 1, 2]  # noqa: N815
    schemaVersion: Literal[39]  # noqa: N815
    version: int
    refresh: str = Field(pattern=r"^\d+[smh]$")
    time: Range
    annotations: Annotations
    links: list[dict[str, Any]]
    templating: Variables
    panels: list[Panel] = Field(min_length=1)


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    board = Dashboard.model_validate(DASHBOARD)
    cells: set[tuple[int, int]] = set()
    for panel in board.panels:
        place = panel.gridPos
        here = {(x, y) for x in range(place.x, place.x + place.w) for y in range(place.y, place.y + place.h)}
        assert not here & cells, f"{panel.title} lies on another panel"
        assert place.x + place.w <= 24
        cells |= here
        assert len({target.refId for target in panel.targets}) == len(panel.targets)
    assert len({panel.id for panel in board.panels}) == len(board.panels)
    known = {variable.name for variable in board.templating.list} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= known


def test_every_metric_of_ours_is_shown_and_every_one_shown_exists() -> None:
    asked = set().union(*map(metrics_in, expressions()))
    assert {name for name in asked if name.startswith("ray_vidshard_")} == OURS


def test_metrics_that_nobody_exports_cost_nothing() -> None:
    metrics = RunMetrics(out="tokens", is_exported=False)
    metrics.add("clips", 1)
    metrics.set("spans_left", 0)
    assert not metrics._metrics


PROMETHEUS = os.environ.get("VIDSHARD_PROMETHEUS") or shutil.which("prometheus")


@contextmanager
def scraping(targets: list[str], folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes the targets each second; gives the URL of its interface."""
    assert PROMETHEUS is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": "ray"}]}
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]  # type: ignore[index]
    (folder / "prometheus.yml").write_text(json.dumps(config))  # YAML reads JSON
    arguments = ["--config.file", folder / "prometheus.yml", "--storage.tsdb.path", folder / "data"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [PROMETHEUS, *map(str, arguments), "--web.listen-address", address], stdout=log, stderr=log
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def has_answer(url: str, expression: str) -> bool:
    """Whether an expression of the dashboard has a value, for all outputs and a rate over twenty seconds."""
    query = expression.replace("$__rate_interval", "20s").replace("$output", ".*")
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=10
        ) as got:
            return bool(json.loads(got.read())["data"]["result"])
    except urllib.error.HTTPError as error:
        pytest.fail(f"{expression}: {error.read().decode()}")
    except OSError:
        return False  # Prometheus is starting


@pytest.mark.slow
@pytest.mark.skipif(
    PROMETHEUS is None, reason="no Prometheus here: put it on the PATH or name it in VIDSHARD_PROMETHEUS"
)
@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="no ray[default] here: pip install 'vidshard[cluster]'"
)
@pytest.mark.timeout(500)
def test_a_real_prometheus_that_scrapes_a_run_has_an_answer_to_every_panel(many_spans: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    out = tmp_path / "tokens"
    files = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of its sockets have to be short
    head: dict[str, Any] = {
        "num_cpus": 2,
        "include_dashboard": True,
        "dashboard_port": 0,
        "object_store_memory": 200_000_000,
    }
    head |= {"temp_dir": files, "_system_config": {"metrics_report_interval_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        found = Path(files) / "prom_metrics_service_discovery.json"
        for _ in range(200):
            targets = json.loads(found.read_text())[0]["targets"] if found.is_file() else []
            if len(targets) >= 3:  # the node, the dashboard, the autoscaler
                break
            time.sleep(0.3)
        with held_back(many_spans / "2.mp4", out) as held, scraping(targets, tmp_path) as url:
            arguments = (
                *inputs(many_spans, held),
                "--out",
                out,
                *RUN,
                *COMMITTED_AT_ONCE,
                "--ray-address",
                cluster.address,
            )
            command = [sys.executable, "-m", "vidshard.jobs.main", "tokenize", *map(str, arguments)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            left = set(expressions())
            for _ in range(300):
                left = {expression for expression in left if not has_answer(url, expression)}
                if not left or process.poll() is not None:
                    break
                time.sleep(0.5)  # Ray reports once a second
            held.let_go()
            printed, _ = process.communicate(timeout=200)
        assert not left, f"{left}\n{printed}"
        assert process.returncode == 0, printed
    finally:
        cluster.shutdown()
        shutil.rmtree(files, ignore_errors=True)
