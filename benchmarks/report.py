"""Output of every benchmark: a table, optionally JSON, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, str | int | float]


def report(name: str, rows: list[Row], json_path: str | None) -> None:
    """Print rows as a table and, with a path, write them with the machine's description as JSON."""
    table = Table(title=f"{name}: {describe_machine()}", title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=200, soft_wrap=True).print(table)
    if json_path:
        record = {"benchmark": name, "machine": describe_machine(), "rows": rows}
        Path(json_path).write_text(json.dumps(record, indent=2) + "\n")


def describe_machine() -> str:
    """Describe processor, cores, GPU and versions in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"
