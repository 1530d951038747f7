"""A real Slurm cluster on one machine, up in a second: slurmctld and some slurmd, each with a host name, an address and a cable of its own.

All daemons live in private network, mount, pid and host name namespaces, whose process 1 reads from a pipe of ours: when this process
ends, however it ends, nothing of the lab is left. The file system is shared by all nodes, like a cluster's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
NUM_NODES = 3

# What must not go missing, each found by a failure: a short cred_expire (a requeued job waits as long before it starts again),
# NoInAddrAny (each slurmd at its own address), config_overrides (more CPUs than there are), proctrack/linuxproc and task/none (no cgroups).
SLURM_CONF = """
ClusterName=lab
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
ReturnToService=0
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
SlurmdTimeout=10
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[11-{last}] CPUs=64 RealMemory=4000 Gres=gpu:4
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=grace Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why this machine cannot have a lab; None where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"no {missing[0]}: a Slurm to test with is installed by: {INSTALL}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"no namespaces ({tried.stderr.strip()}): run as root, in a container with --cap-add SYS_ADMIN,NET_ADMIN"
    return None


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class SlurmLab:
    """`with SlurmLab(folder) as lab`: nodes n1, n2 ... with partitions low, grace and high, which preempts the others."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __enter__(self) -> SlurmLab:
        for name in ("log", "state"):
            (self.base / name).mkdir(parents=True)
        (self.base / "slurm.conf").write_text(SLURM_CONF.format(base=self.base, nodes=NUM_NODES, last=10 + NUM_NODES))
        (self.base / "gres.conf").write_text(f"Name=gpu File={self.base}/gpu[0-3]\n")
        (self.base / "cgroup.conf").write_text("")
        (self.base / "munge.key").write_bytes(os.urandom(128))
        (self.base / "munge.key").chmod(0o400)
        command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        command += [str(Path(__file__).with_name("lab_init.sh")), str(self.base), str(NUM_NODES)]
        with open(self.base / "log/init.log", "w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, "PATH": _path()},
            )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while not (self.base / "ready").exists():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the Slurm lab did not come up:\n{self.logs()}")
            time.sleep(0.05)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._init = int(children.split()[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()  # and with it, by --kill-child, process 1 of the namespace, and with that all others
        self._process.communicate()

    def call(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """The output of a command that runs inside; AssertionError where it fails."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._init), "-n", "-m", "-p", "-u", f"--wdns={cwd or self.base}", "--", *command],
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "PATH": _path(), "SLURM_CONF": f"{self.base}/slurm.conf", **(env or {})},
        )  # fmt: skip
        assert done.returncode == 0, f"{command} gave {done.returncode}: {done.stderr}{done.stdout}"
        return done.stdout

    def cut(self, node: int) -> None:
        """Pull a node's network cable."""
        self.call("ip", "link", "set", f"v{node}", "down")

    def join(self, node: int) -> None:
        self.call("ip", "link", "set", f"v{node}", "up")

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in sorted((self.base / "log").iterdir()))
