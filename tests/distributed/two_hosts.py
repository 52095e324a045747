"""Two hosts on one machine: network namespaces with an address each and a cable between them.

Where the machine allows no namespaces, both are this machine and talk over its loopback device.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ETC = Path("/etc/netns")
_CARD = "eth0"  # every host calls its end of the cable so
_ADDRESSES = ["10.99.7.1", "10.99.7.2"]


class Hosts:
    """Two hosts that share a file system.

    Attributes:
        separate: Whether they have networks of their own.
        name: Of the first host, as the second knows it.
    """

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex[:8]
        self._names = [f"rewarm-{self._mark}-{host}" for host in (0, 1)]
        self.separate = self._connect()
        self.name = "node0" if self.separate else "127.0.0.1"
        self._port = 29500 if self.separate else _free_port()

    def start(
        self, host: int, command: list[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command; what it says is added to a file."""
        inside = ["ip", "netns", "exec", self._names[host]] if self.separate else []
        found = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": self.name,
            "MASTER_PORT": str(self._port),
            "REWARM_TEST_HOST": f"{self._mark}-{host}",
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                [*inside, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | found | environment,
                start_new_session=True,
            )

    def running(self, host: int | None = None, words: str = "") -> list[int]:
        """Return the processes that run on a host, or on both, orphans too."""
        mark = f"REWARM_TEST_HOST={self._mark}-{'' if host is None else host}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:  # ended meanwhile, or somebody else's
                continue
            # A process that has ended but was not waited for has no command line.
            if mark in environment and command and words in command.replace(b"\0", b" ").decode():
                found.append(int(folder.name))
        return found

    def unplug(self, host: int) -> None:
        """Take a host off the network; it keeps running."""
        _ip("-n", self._names[host], "link", "set", _CARD, "down")

    def plug_in(self, host: int) -> None:
        """Put it back."""
        _ip("-n", self._names[host], "link", "set", _CARD, "up")

    def received(self, host: int) -> int:
        """Return how many bytes have come to a host over the cable."""
        (card,) = json.loads(_ip("-n", self._names[host], "-s", "-j", "link", "show", _CARD))
        return int(card["stats64"]["rx"]["bytes"])

    def close(self) -> None:
        """End whatever runs, and remove the networks."""
        for process in self.running():
            os.kill(process, signal.SIGKILL)
        if self.separate:
            self._disconnect()

    def _connect(self) -> bool:
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        first, second = self._names
        try:
            for name in self._names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", first, "link", "add", _CARD, "type", "veth", "peer", "name", _CARD, "netns", second)
            for host, name in enumerate(self._names):
                _ip("-n", name, "address", "add", f"{_ADDRESSES[host]}/24", "dev", _CARD)
                _ip("-n", name, "link", "set", _CARD, "up")
                # `ip netns exec` shows this file in place of /etc/hosts.
                names = [f"{address} node{other}" for other, address in enumerate(_ADDRESSES)]
                names[host] += f" {socket.gethostname()}"
                (_ETC / name).mkdir(parents=True)
                (_ETC / name / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        except (subprocess.CalledProcessError, OSError):  # root in a container often may not
            self._disconnect()
            return False
        return True

    def _disconnect(self) -> None:
        for name in self._names:
            shutil.rmtree(_ETC / name, ignore_errors=True)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Give two hosts, and leave nothing of them behind."""
    hosts = Hosts()
    try:
        yield hosts
    finally:
        hosts.close()


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Return the exit codes of processes that end in time."""
    deadline = time.monotonic() + seconds
    return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
