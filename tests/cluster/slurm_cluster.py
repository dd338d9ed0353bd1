"""Debian's Slurm on one machine: a controller and two nodes, each a host with a network of its own.

    cluster = SlurmCluster(Path("/var/tmp/somewhere")); cluster.start(); ...; cluster.stop()

`ctl`, `n1` and `n2` are network and UTS namespaces joined by a bridge inside `ctl`, so that daemons
reach one another by name and nothing outside can reach them. Each has a /tmp of its own; all other
folders are shared, as on a cluster: the folder given must not lie under /tmp. munge has a key and
socket of its own here, and everything that was started is ended by its process id. Root only;
Debian's packages `slurmctld slurmd slurm-client munge iproute2`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
ADDRESSES = {"ctl": "10.78.0.1", "n1": "10.78.0.11", "n2": "10.78.0.12"}
NODES = ("n1", "n2")
START_SECONDS = 60.0

# cgroups are left out: they would need a writable cgroup v2 tree, which containers lack.
_CONF = """
ClusterName=pocl
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=20
KillWait=30
ReturnToService=2
SchedulerParameters=bf_interval=5,sched_interval=5,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000
NodeName=n1 NodeAddr={n1} NodeHostname=n1
NodeName=n2 NodeAddr={n2} NodeHostname=n2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


@dataclass
class SlurmCluster:
    """The daemons and namespaces; `prefix` keeps the names of two clusters apart."""

    folder: Path
    prefix: str = "pocl"
    cpus: int = 2
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment of every command: where the cluster's config is."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def on(self, host: str, *command: str) -> list[str]:
        """Returns the command that runs `command` on a host (`ctl`, `n1` or `n2`)."""
        # Not `ip netns exec`: its new /sys hides the cgroups that slurmd asks for.
        script = (
            'mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/tmp-$1" /tmp && '
            'hostname "$1" && shift && exec "$@"'
        )
        space = f"--net=/run/netns/{self.prefix}-{host}"
        shell = ["unshare", "--uts", "--mount", "bash", "-c", script, str(self.folder), host]
        return ["nsenter", space, *shell, *command]

    def run(self, *command: str, host: str = "ctl", check: bool = True) -> str:
        """Runs a command to its end and returns what it printed; its error output is in ours."""
        done = subprocess.run(
            self.on(host, *command),
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def start(self) -> None:
        """Makes the hosts and starts munge, controller and nodes; returns when both are idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = [f"tmp-{host}" for host in ADDRESSES] + [f"spool-{node}" for node in NODES]
        for name in ("state", "munge", *own):
            (self.folder / name).mkdir(mode=0o755, exist_ok=True)
        values = {**ADDRESSES, "folder": self.folder, "cpus": self.cpus}
        (self.folder / "slurm.conf").write_text(_CONF.format(**values))
        self._make_hosts()
        self._start_munge()
        self._spawn("slurmctld", "ctl", "slurmctld", "-c", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._spawn(node, node, "slurmd", "-D", "-N", node)

    def wait_idle(self) -> None:
        """Returns when every node is idle; RuntimeError with the states after a minute."""
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends:
            states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%n %t", check=False).split()
            if states.count("idle") == len(NODES):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the nodes are not idle: {states}; see {self.folder}/*.log")

    def _make_hosts(self) -> None:
        lines = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
        for host in ADDRESSES:
            space = f"{self.prefix}-{host}"
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        bridge = f"{self.prefix}-ctl"
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "addr", "add", f"{ADDRESSES['ctl']}/24", "dev", "br0")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for node in NODES:
            space = f"{self.prefix}-{node}"
            # Made inside the namespaces: nothing of it ever shows in the machine's own network.
            _ip("-n", bridge, "link", "add", node, "type", "veth", "peer", "eth0", "netns", space)
            _ip("-n", bridge, "link", "set", node, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        socket = folder / "socket"
        files = {"key": key, "socket": socket, "pid": folder / "pid", "log": folder / "log"}
        options = [f"--{name}-file={path}" for name, path in files.items() if name != "socket"]
        options += [f"--socket={socket}", f"--seed-file={folder / 'seed'}"]
        self._spawn("munged", "ctl", "munged", "--foreground", "--force", *options)
        ends = time.monotonic() + START_SECONDS
        while not socket.exists():
            if time.monotonic() > ends:
                raise RuntimeError(f"munged has made no socket: see {folder / 'log'}")
            time.sleep(0.1)

    def _spawn(self, name: str, host: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self.on(host, *command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends all jobs, daemons and namespaces, also of a cluster that only half started."""
        if "slurmctld" in self._processes:
            self.run("scancel", "--user=root", check=False)
        for host in ADDRESSES:
            end_all(f"{self.prefix}-{host}")
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{host}"], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def end_all(space: str, seconds: float = 10.0) -> None:
    """Ends every process of a network namespace of ours: SIGTERM, and SIGKILL after `seconds`."""
    ends = time.monotonic() + seconds
    number = signal.SIGTERM
    while True:
        listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
        pids = [int(word) for word in listed.stdout.split()]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > ends:
            number = signal.SIGKILL
        time.sleep(0.5)
