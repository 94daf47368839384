"""A Slurm cluster of one node, of the distribution's own packages, for as long as a test needs it.

It authenticates nobody (auth/none), listens on this machine only, and keeps everything in one folder.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "sinfo")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """A running cluster; yields its slurm.conf, which SLURM_CONF has to name."""
    host = socket.gethostname().partition(".")[0]
    controller, daemon = _free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, controller=controller, daemon=daemon, folder=folder))
    commands = (["slurmctld", "-D", "-f", config], ["slurmd", "-D", "-f", config, "-N", host])
    running = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.log", "w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        _wait_for_node(config)
        yield config
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(60)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for_node(config: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env={"SLURM_CONF": str(config), "PATH": "/usr/bin:/bin"}, capture_output=True
        )
        if asked.stdout.strip() == b"idle":
            return
        time.sleep(0.2)
    logs = "".join(path.read_text() for path in config.parent.glob("*.log"))
    raise TimeoutError(f"the node of the cluster is not idle after {seconds} s:\n{logs}")
