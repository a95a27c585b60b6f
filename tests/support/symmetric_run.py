"""``ray symmetric-run`` for two nodes of one host, where the real one would end every Ray of the host.

Started as ``ray`` by the script of Slurm: `install` puts it first on the path. Like the real one it starts the head
where the job's first task is, joins it from the others, runs the command at the head, and ends with its exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import RpcError


def install(folder: Path) -> Path:
    """Write a program ``ray`` that runs this module; returns its folder."""
    folder.mkdir()
    program = folder / "ray"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.symmetric_run "$@"\n')
    program.chmod(0o755)
    return folder


def _run(arguments: list[str]) -> int:
    assert arguments[0] == "symmetric-run"
    own, command = arguments[1 : arguments.index("--")], arguments[arguments.index("--") + 1 :]
    flags = dict(zip(own[::2], own[1::2], strict=True))
    address, num_nodes = flags["--address"], int(flags["--min-nodes"])
    host, port = address.rsplit(":", 1)
    is_head = os.environ["SLURM_NODEID"] == "0"
    if is_head:
        where = ["--head", "--port", port, "--include-dashboard=false"]
    else:
        _wait_for_nodes(address, 1)
        where = ["--address", address]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", *where]
    start += ["--node-ip-address", host, "--num-cpus=1", "--object-store-memory=200000000", "--block"]
    # "ray start" would take RAY_ADDRESS for a cluster to join
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # "ray stop" does not wait for work either
    ray = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL)
    try:
        if not is_head:
            return ray.wait()
        _wait_for_nodes(address, num_nodes)
        return subprocess.run(command, check=False).returncode
    finally:
        ray.terminate()  # --block ends the processes that it started, and no others
        ray.wait()


def _wait_for_nodes(address: str, count: int) -> None:
    while True:
        try:
            client = GcsClient(address=address)
            if len(client.get_all_node_info(timeout=5)) >= count:
                return
        except RpcError:
            pass
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
