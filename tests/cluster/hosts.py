"""Several hosts on one machine: network namespaces with names, addresses and sshd of their own.

Their interfaces meet in the namespace of the head, so no packet reaches the machine's network, and
several of these may run side by side. They share the file system, as the nodes of a cluster do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

SSH_PORT = 2222
PACKAGES = ("openssh-server", "openssh-client", "iproute2")
_TOOLS = ("ip", "ssh", "ssh-keygen", "sshd", "unshare")


def why_not() -> str:
    """Returns why hosts cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces and sshd need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: {' '.join(PACKAGES)})"
    probe = f"pocl-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Hosts:
    """Context manager: a head and some hosts, `ctl`, `h1`, `h2`, ...; all end with it."""

    def __init__(self, folder: Path, num_hosts: int = 2) -> None:
        """`folder` holds keys and configs; it may be read by the caller only."""
        self.folder = folder
        self.names = [f"h{index}" for index in range(1, num_hosts + 1)]
        self.head = "ctl"
        self.address = {self.head: "10.77.0.1"}
        self.address |= {name: f"10.77.0.{10 + i}" for i, name in enumerate(self.names, 1)}
        self._tag = f"pocl{os.getpid()}"
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def ssh_config(self) -> Path:
        """Returns the file for `ssh -F`."""
        return self.folder / "ssh_config"

    def namespace(self, name: str) -> str:
        """Returns the name of a host's network namespace."""
        return f"{self._tag}-{name}"

    def __enter__(self) -> Hosts:
        try:
            self._make_network()
            self._make_keys()
            for name in self.names:
                self.start_sshd(name)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    # --- what tests do

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """Returns the command line that runs `words` on a host (or the head)."""
        script = f'hostname {name} && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", script, "sh", *words]
        return ["ip", "netns", "exec", self.namespace(name), *inside]

    def start(
        self,
        name: str,
        words: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts `words` on a host; its output goes to `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(name, words),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                start_new_session=True,
            )

    def cut(self, name: str) -> None:
        """Pulls the network cable of a host; its processes and its files live on."""
        self._in(self.head, "ip", "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Puts the cable back."""
        self._in(self.head, "ip", "link", "set", f"to-{name}", "up")

    def pids(self, name: str) -> list[int]:
        """Returns the processes of a host, without its sshd and that one's children that wait."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True
        ).stdout.split()
        return [int(pid) for pid in found if not _command_of(int(pid)).startswith("sshd")]

    def kill(self, name: str) -> None:
        """Ends all processes of a host at once, its sshd too: the machine has died."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True
        ).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def wait_until_quiet(self, names: Sequence[str], seconds: float) -> dict[str, list[str]]:
        """Waits until no process is left on the hosts; returns {host: those that are}."""
        ends_at = time.monotonic() + seconds
        while True:
            left = {name: [_command_of(pid) for pid in self.pids(name)] for name in names}
            left = {name: commands for name, commands in left.items() if commands}
            if not left or time.monotonic() > ends_at:
                return left
            time.sleep(0.2)

    def start_sshd(self, name: str) -> None:
        """Starts sshd of a host and waits until it answers."""
        config = self.folder / f"sshd_{name}"
        config.write_text(
            f"Port {SSH_PORT}\nListenAddress {self.address[name]}\n"
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "sshd"
        words = [sshd, "-D", "-e", "-f", str(config)]
        self._servers[name] = self.start(name, words, self.folder / f"sshd_{name}.log")
        ends_at = time.monotonic() + 20
        ask = ["ssh", "-F", str(self.ssh_config), "-p", str(SSH_PORT), "-o", "BatchMode=yes"]
        ask = self.command(self.head, [*ask, name, "true"])
        while subprocess.run(ask, capture_output=True).returncode:
            if time.monotonic() > ends_at:
                log = (self.folder / f"sshd_{name}.log").read_text()
                raise RuntimeError(f"sshd of {name} does not answer:\n{log}")
            time.sleep(0.1)

    # --- how it is made and taken away

    def _in(self, name: str, *words: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.namespace(name), *words], check=True)

    def _make_network(self) -> None:
        """A bridge in the head's namespace, a pair of interfaces per host."""
        lines = "".join(f"{address} {name}\n" for name, address in self.address.items())
        for name in self.address:
            subprocess.run(["ip", "netns", "add", self.namespace(name)], check=True)
            self._in(name, "ip", "link", "set", "lo", "up")
            etc = Path("/etc/netns") / self.namespace(name)  # `ip netns exec` puts it over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
        head = self.namespace(self.head)
        self._in(self.head, "ip", "link", "add", "bridge", "type", "bridge")
        self._in(self.head, "ip", "addr", "add", f"{self.address[self.head]}/24", "dev", "bridge")
        self._in(self.head, "ip", "link", "set", "bridge", "up")
        for name in self.names:
            pair = ["type", "veth", "peer", "name", "eth0", "netns", self.namespace(name)]
            subprocess.run(["ip", "link", "add", f"to-{name}", "netns", head, *pair], check=True)
            self._in(self.head, "ip", "link", "set", f"to-{name}", "master", "bridge", "up")
            self._in(name, "ip", "addr", "add", f"{self.address[name]}/24", "dev", "eth0")
            self._in(name, "ip", "link", "set", "eth0", "up")

    def _make_keys(self) -> None:
        """One key for the hosts, one for the user; no file outside of `folder` is touched."""
        for key in ("host_key", "user_key"):
            path = str(self.folder / key)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        public = " ".join((self.folder / "host_key.pub").read_text().split()[:2])
        known = "".join(f"[{name}]:{SSH_PORT} {public}\n" for name in self.names)
        (self.folder / "known_hosts").write_text(known)
        self.ssh_config.write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking yes\n"
            "  LogLevel ERROR\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges

    def _end(self) -> None:
        for name in self.address:
            self.kill(name)
        for server in self._servers.values():
            server.wait()
        for name in self.address:
            subprocess.run(["ip", "netns", "del", self.namespace(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self.namespace(name), ignore_errors=True)


def _command_of(pid: int) -> str:
    """Returns the command line of a process; `sshd` for one that is gone, which counts as none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "sshd (gone)"
    text = b" ".join(words).decode(errors="replace").strip()
    return text.rpartition("/")[2] if text.startswith("/usr/sbin/sshd") else text or "sshd (gone)"
