"""Hosts of a cluster on this machine: namespaces with interfaces, names, processes, /tmp and an sshd of their own.

A host shares with the others what a cluster's hosts share: the file system, less /tmp, /run, /dev/shm, /proc and /sys.
Switches are bridges in a further network namespace. Nothing of it has a name on this machine, so two clusters at a time
do not meet, and nothing is left of one whose test was killed: a host is the children of one process, which the kernel
ends with the test, and interfaces go with the last process of their namespace. Needs root, iproute2, util-linux and
openssh-server.
"""

import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher import watch
from launcher.env import without_world
from tests.ranks import ROOT

PROGRAMS = ("unshare", "nsenter", "ip", "mount", "ssh", "ssh-keygen", "sshd")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_SECONDS = 60.0
_HOST = """
hostname {hostname}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/old
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount --rbind /tmp /run/old
mount -t tmpfs -o mode=1777 tmpfs /tmp
{shared}
umount -l /run/old
ip link set lo up
touch {folder}/up-{name}
exec {sshd} -D -e -f {folder}/sshd_config
"""
_SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
"""
_SSH = """
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking no
ConnectTimeout 5
ServerAliveInterval 2
ServerAliveCountMax 2
LogLevel ERROR
"""


@cache
def why_not() -> str:
    """Returns why no cluster can be made here, or ""."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 util-linux openssh-server)"
    if os.geteuid():
        return "needs root"
    # What a container may forbid: namespaces, file systems of their own, interfaces.
    tried = "mount -t proc proc /proc && mount -t sysfs sysfs /sys && ip link add one type veth peer name two"
    tried += " && ip link add three type bridge"
    finished = subprocess.run([*_unshare(), "sh", "-c", tried], env=_environ(), capture_output=True, text=True)
    return f"no namespaces can be made here: {finished.stderr.strip()}" if finished.returncode else ""


@dataclass(frozen=True)
class Card:
    """An interface of a host: its addresses, the switch it is plugged into, and the Mbit/s it claims.

    Without a switch it is a bridge of the host's own, as docker's is to its containers.
    """

    name: str
    addresses: tuple[str, ...]  # with their prefix: 10.0.0.1/24
    switch: str = ""
    speed: int = 0


def card(text: str) -> Card:
    """Returns the interface of "eth0 10.0.0.1/24,fd00::1/64 office 1000"; switch and speed may be left out."""
    name, addresses, *more = text.split()
    return Card(name, tuple(addresses.split(",")), more[0] if more else "", int(more[1]) if len(more) > 1 else 0)


class Cluster:
    """Running hosts. A name leads to the address of the host's first interface at a switch."""

    def __init__(
        self, hosts: Mapping[str, Sequence[str]], shared: Iterable[Path] = (), hostnames: Mapping[str, str] = {}
    ) -> None:
        """Starts the hosts.

        Args:
            hosts: The interfaces of each, in words of `card`.
            shared: Folders under /tmp that all hosts see, beside this repository and its Python.
            hostnames: What hosts call themselves, where that is not their name.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="cluster-test-", dir="/tmp"))
        self._cards = {name: [card(text) for text in texts] for name, texts in hosts.items()}
        self._processes: dict[str, subprocess.Popen] = {}
        self._started: list[subprocess.Popen] = []
        try:
            self._write()
            self._start([*shared, self.folder], hostnames)
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything, hosts with all that runs on them, and removes the folder."""
        for process in self._processes.values():
            process.kill()
        for process in [*self._processes.values(), *self._started]:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def hostfile(self, text: str) -> str:
        """Returns the path of a file with this text, which all hosts see."""
        path = self.folder / f"hostfile-{len(list(self.folder.iterdir()))}"
        path.write_text(text)
        return str(path)

    def start(self, host: str, *command: str, **variables: str) -> subprocess.Popen:
        """Returns a command that was started on a host, in this repository's folder; stderr goes where stdout goes."""
        environ = without_world(os.environ) | {"PATH": _PATH, "OMP_NUM_THREADS": "1"} | variables
        process = subprocess.Popen(
            self._enter(host, *command),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._started.append(process)
        return process

    def run(self, host: str, *command: str, timeout: float = 180, **variables: str) -> tuple[int, str]:
        """Returns (exit code, output) of a command on a host."""
        process = self.start(host, *command, **variables)
        try:
            output = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            words = "\n".join(self.processes(host).values())
            self.kill(host)
            output = process.communicate()[0]
            raise AssertionError(f"{shlex.join(command)} took over {timeout} s:\n{output}\n{words}") from None
        return process.returncode, output

    def kill(self, host: str) -> None:
        """Ends a host as if its power failed: nobody hears of it from the host itself."""
        for card in self._cards[host]:
            if card.switch and self._processes[host].poll() is None:
                self.cut(host, card.name)
        self._processes[host].kill()
        self._processes[host].wait()

    def cut(self, host: str, name: str) -> None:
        """Pulls the plug of an interface at the switch; on the host it only loses its carrier."""
        self._in("switches", "ip", "link", "set", self._port(host, name), "down")

    def slow_down(self, host: str, name: str, rate: str) -> None:
        """Limits what a host sends and gets over an interface, such as to 10mbit (tc(8))."""
        limit = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        self._in("switches", "tc", "qdisc", "add", "dev", self._port(host, name), *limit)
        self._in(host, "tc", "qdisc", "add", "dev", name, *limit)

    def pid(self, host: str) -> int:
        """Returns the first process of a host, as this machine counts."""
        outer = self._processes[host].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def processes(self, host: str) -> dict[int, str]:
        """Returns {pid as this machine counts: command line} of a host, less its first process."""
        first, found = self.pid(host), {}
        own = os.stat(f"/proc/{first}/ns/pid").st_ino
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if words and int(path.name) != first and os.stat(path / "ns/pid").st_ino == own:
                    found[int(path.name)] = words
        return found

    def listeners(self, host: str, words: str = "") -> set[tuple[str, int]]:
        """Returns (address, port) of every TCP socket at which processes of a host listen, but for its sshd.

        Args:
            words: Beginning of the processes' command lines; what others left open to them does not count.
        """
        found: set[tuple[str, int]] = set()
        sockets: set[str] = set()
        others: set[str] = set()
        for pid, line in self.processes(host).items():
            (sockets if line.startswith(words) else others).update(_sockets_of(pid))
        for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/{self.pid(host)}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in sockets - others:  # TCP_LISTEN (linux/tcp_states.h), inode
                    address, _, port = fields[1].partition(":")
                    found.add((_address(address, family), int(port, 16)))
        return found

    def _write(self) -> None:
        folder = self.folder
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for host, cards in self._cards.items():
            known = next((card.addresses[0] for card in cards if card.switch), "")
            if known:
                lines.append(f"{known.partition('/')[0]} {host}")
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").write_text("")
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        (folder / "ssh_config").write_text(_SSH.format(folder=folder))
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / "key")]
        subprocess.run(key, env=_environ(), check=True, capture_output=True)

    def _start(self, shared: list[Path], hostnames: Mapping[str, str]) -> None:
        kept = [path.resolve() for path in (*shared, ROOT, Path(sys.prefix), Path(sys.base_prefix))]
        lines = []
        for path in sorted({path for path in kept if path.is_relative_to("/tmp")}):
            there = shlex.quote(str(path))
            old = shlex.quote(str(Path("/run/old", path.relative_to("/tmp"))))
            lines.append(f"mkdir -p {there} && mount --bind {old} {there}")
        self._process("switches", "exec sleep infinity")
        for name in self._cards:
            sshd = shutil.which("sshd", path=_PATH)
            own = hostnames.get(name, name)
            script = _HOST.format(name=name, hostname=own, folder=self.folder, shared="\n".join(lines), sshd=sshd)
            self._process(name, script)
        deadline = time.monotonic() + _START_SECONDS
        while not all((self.folder / f"up-{name}").exists() for name in self._cards):
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                log = (self.folder / "log").read_text(errors="replace")
                raise AssertionError(f"{', '.join(ended) or 'a host'} did not come up:\n{log[-2000:]}")
            time.sleep(0.02)

    def _process(self, name: str, script: str) -> None:
        tests = os.getpid()
        with (self.folder / "log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*_unshare(), "sh", "-e", "-c", script],
                env=_environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: watch.die_with_parent(tests),
            )

    def _connect(self) -> None:
        switches = sorted({card.switch for cards in self._cards.values() for card in cards if card.switch})
        of_switches = [line for name in switches for line in (f"link add {name} type bridge", f"link set {name} up")]
        self._ip("switches", of_switches)
        other_end, plugs = self._processes["switches"].pid, []
        for host, cards in self._cards.items():
            lines = []
            for card in cards:
                port = self._port(host, card.name)
                if card.switch:
                    lines.append(f"link add {card.name} type veth peer name {port} netns {other_end}")
                    plugs += [f"link set {port} master {card.switch}", f"link set {port} up"]
                else:  # with a container in it, without which the kernel does not call it running
                    lines += [f"link add {card.name} type bridge", "link add c0 type veth peer name c1"]
                    lines += [f"link set c1 master {card.name} up", "link set c0 up"]
                lines += [f"addr add {address} dev {card.name} {_more(address)}" for address in card.addresses]
                lines.append(f"link set {card.name} up")
            self._ip(host, lines)
            for card in cards:
                if card.speed:
                    (self.folder / f"speed-{card.speed}").write_text(f"{card.speed}\n")
                    claim = f"/sys/class/net/{card.name}/speed"
                    self._in(host, "mount", "--bind", str(self.folder / f"speed-{card.speed}"), claim)
        self._ip("switches", plugs)

    def _port(self, host: str, name: str) -> str:
        return f"p{list(self._cards).index(host)}-{name}"

    def _ip(self, where: str, lines: list[str]) -> None:
        self._in(where, "ip", "-batch", "-", input="\n".join(lines))

    def _in(self, where: str, *command: str, **options: Any) -> None:
        """Runs a command of this machine's in the network and mounts of a host, which may be dead."""
        inside = ["nsenter", "-t", str(self._processes[where].pid), "-n", "-m", *command]
        finished = subprocess.run(inside, env=_environ(), capture_output=True, text=True, **options)
        assert finished.returncode == 0, f"{shlex.join(command)} on {where}: {finished.stderr}"

    def _enter(self, host: str, *command: str) -> list[str]:
        inside = ["nsenter", "-t", str(self.pid(host)), "-n", "-u", "-i", "-m", "-p"]
        return [*inside, "sh", "-c", f'cd {shlex.quote(str(ROOT))} && exec "$@"', "sh", *command]


def _unshare() -> list[str]:
    return ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]


def _environ() -> dict[str, str]:
    return os.environ | {"PATH": _PATH}


def _sockets_of(pid: int) -> list[str]:
    """Returns the inodes of a process's sockets."""
    found = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                kind, _, inode = os.readlink(path).partition(":")
                found += [inode.strip("[]")] if kind == "socket" else []
    return found


def _more(address: str) -> str:
    return "nodad" if ":" in address else ""  # an address that is being looked for twice cannot be listened at


def _address(text: str, family: int) -> str:
    """Returns the address of /proc/net/tcp: words of four bytes, each in this machine's order."""
    raw = b"".join(struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8))
    return socket.inet_ntop(family, raw)
