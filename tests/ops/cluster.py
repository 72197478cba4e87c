"""A real SLURM cluster of two nodes on this machine: own munged, slurmctld and two slurmd,
everything under one folder.

Debian's packages are enough (apt-get install slurmctld slurmd slurm-client munge); nothing is
started by systemd, nothing outside the folder changes. The daemons run in separate mount
namespaces: there the nodes' names resolve to this machine, and each node has its own disk at the
same path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    gone = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if gone:
        return (
            f"{', '.join(gone)} not installed: apt-get install slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "starting SLURM's daemons needs root"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "mount namespaces are not allowed here"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    disk: Path
    """Where each node sees its own disk."""

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def node_disk(self, node: str) -> Path:
        """A node's disk as this machine sees it."""
        return self.folder / f"disk-{node}"

    def slurm(self, *words: str) -> str:
        """What one of SLURM's commands prints; raises where it fails."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows about a job: JobState, Restarts, ExitCode, ..."""
        return dict(
            word.split("=", 1)
            for word in self.slurm("scontrol", "show", "job", number).split()
            if "=" in word
        )


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the cluster, wait until both nodes are idle, and end it."""
    made = Cluster(folder, folder / "disk")
    for name in (
        "state",
        "log",
        "munge",
        "disk",
        *(f"{kind}-{node}" for kind in ("spool", "disk") for node in NODES),
    ):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    hosts = Path("/etc/hosts").read_text(encoding="utf-8")
    (folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(NODES)}\n", encoding="utf-8")
    (folder / "slurm.conf").write_text(_configuration(folder), encoding="utf-8")
    processes: list[subprocess.Popen] = []
    try:
        munge = folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        processes.append(
            _start(
                made,
                "munged",
                "munged",
                "--foreground",
                "--force",
                f"--socket={munge / 'socket'}",
                *files,
            )
        )
        _wait(lambda: (munge / "socket").exists(), 10, "munged did not start")
        processes.append(_start(made, "slurmctld", "slurmctld", "-D", "-i"))
        processes += [_start(made, node, "slurmd", "-D", "-N", node) for node in NODES]
        _wait(
            lambda: _idle(made) == len(NODES), 60, f"the nodes are not idle; see {folder / 'log'}"
        )
        yield made
    finally:
        subprocess.run(["scancel", "--user=root"], env=made.environment, capture_output=True)
        with contextlib.suppress(AssertionError):
            _wait(lambda: _idle(made) == len(NODES), 30, "")
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)


def _start(made: Cluster, name: str, *words: str) -> subprocess.Popen:
    """Start a daemon in its own mount namespace, where a node's daemon has the node's disk."""
    mounts = f"mount --bind {made.folder}/hosts /etc/hosts"
    if name in NODES:
        mounts += f" && mount --bind {made.node_disk(name)} {made.disk}"
    script = f'{mounts} && exec "$@"'
    with open(made.folder / "log" / f"{name}.out", "wb") as log:
        return subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", *words], env=made.environment,
            stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip


def _idle(made: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=made.environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.split().count("idle")


def _wait(condition: object, seconds: float, complaint: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _configuration(folder: Path) -> str:
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
    nodes = "\n".join(
        (
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
            f"RealMemory=1000 State=UNKNOWN"
        )
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    # cred_expire is how long a requeued job waits, at least 5 s; config_overrides lets the nodes
    # have more cores than the machine.
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=60
KillWait=10
MinJobAge=600
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
"""
