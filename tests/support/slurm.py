"""A real Slurm of two nodes on this host, for as long as a test needs it.

Debian's packages slurmctld, slurmd, slurm-client and slurm-wlm-basic-plugins are enough. They may be installed, or be
unpacked (``dpkg -x``) into a folder that ``SLURM_ROOT`` names, with the libraries that they need.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm:
    """A running Slurm."""

    environment: dict[str, str]
    """Variables with which its commands find it."""

    def run(self, *command: object) -> str:
        """Standard output of a command of Slurm."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, job: str, *states: str) -> None:
        """Return when a job is in one of the states; fail if it ends in another one."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        while (state := self.state(job)) not in states:
            assert state not in ended, self.run("scontrol", "show", "job", job)
            time.sleep(0.2)

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING or COMPLETED."""
        [state] = [word for word in self.run("scontrol", "show", "job", job).split() if word.startswith("JobState=")]
        return state.removeprefix("JobState=")


def programs() -> dict[str, Path] | None:
    """Path by name of Slurm's programs; None where one is missing."""
    root = Path(os.environ.get("SLURM_ROOT", "/"))
    folders = [root / folder for folder in ("usr/sbin", "usr/bin")]
    found: dict[str, Path] = {}
    for name in _PROGRAMS:
        places = [folder / full for folder in folders for full in (name, f"{name}-wlm")]
        existing = [place for place in places if place.exists()]
        if not existing:
            return None
        found[name] = existing[0]
    return found


@contextmanager
def slurm_of_two_nodes(folder: Path) -> Iterator[Slurm]:
    """Start Slurm's controller and two nodes; they end with the context."""
    tools = programs()
    assert tools is not None
    libraries = Path(os.environ.get("SLURM_ROOT", "/")) / "usr/lib/x86_64-linux-gnu"
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name, path in tools.items():
        (binaries / name).symlink_to(path)
    conf = folder / "slurm.conf"
    ports = free_ports(3)
    conf.write_text(
        f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={Path(folder).owner()}
SlurmdUser={Path(folder).owner()}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=2
PluginDir={libraries}/slurm-wlm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=600
KillWait=30
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join([str(libraries), str(libraries / "slurm-wlm")]),
    }
    (folder / "state").mkdir()
    slurm = Slurm(environment=environment)
    with ExitStack() as stack:
        _start(stack, [binaries / "slurmctld", "-D"], environment)
        for name in ("n1", "n2"):
            (folder / f"spool.{name}").mkdir()
            _start(stack, [binaries / "slurmd", "-D", "-N", name, "-d", tools["slurmstepd"]], environment)
        _until(lambda: _idle_nodes(environment) == 2)
        yield slurm
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=environment, check=False)


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.2)


def _start(stack: ExitStack, command: list[object], environment: dict[str, str]) -> None:
    process = subprocess.Popen([str(word) for word in command], env=environment, stdin=subprocess.DEVNULL)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)


def _idle_nodes(environment: dict[str, str]) -> int:
    sinfo = shutil.which("sinfo", path=environment["PATH"])
    assert sinfo is not None
    command = [sinfo, "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split().count("idle")
