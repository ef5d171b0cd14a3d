"""Hosts of a cluster on one machine: Linux network namespaces, each with an address and a Ray of its own.

```
 host-0 ---+
 host-1 ---+--- a bridge, in a namespace of its own
 host-2 ---+
```

A process belongs to the host in whose namespace it runs, so a whole host can be killed (each process by its id) or cut
off (its link taken down). They share the machine's disk: a folder is to them what NFS is to others. The temporary
folder of each is its own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
NAMESPACE = re.compile(r"mdc(\d+)-\w+")  # the number is of the process that made it
NETWORK = "10.77.0"
GCS_PORT = 6399
OBJECT_STORE_BYTES = 100 * 2**20
# A dead host is found out in seconds instead of half a minute.
RAY_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def why_not() -> str | None:
    """Why there can be no such hosts here, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the command ip (Debian: iproute2), to make network namespaces"
    probe = f"mdc{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"needs network namespaces: {made.stderr.strip()}"
    try:
        bridge = subprocess.run(
            ["ip", "-n", probe, "link", "add", "bridge", "type", "bridge"], capture_output=True, text=True
        )
    finally:
        _ip("netns", "del", probe)
    return None if bridge.returncode == 0 else f"needs network bridges: {bridge.stderr.strip()}"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Host:
    """One of the hosts; `address` is its own in the network of the cluster."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self._cluster = cluster
        self.namespace = f"{cluster.prefix}-{number}"
        self.address = f"{NETWORK}.{number + 1}"
        self._link = f"link{number}"
        self.folder = cluster.folder / f"host-{number}"
        self.folder.mkdir()
        self.is_cut_off = False
        self._children: list[subprocess.Popen[Any]] = []

    def plug_in(self) -> None:
        """Makes the namespace and the cable to the bridge."""
        switch = self._cluster.switch
        _ip("netns", "add", self.namespace)
        _ip("link", "add", "eth0", "netns", self.namespace, "type", "veth", "peer", "name", self._link, "netns", switch)
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.namespace, "link", "set", device, "up")
        _ip("-n", switch, "link", "set", self._link, "master", "bridge", "up")

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any) -> Any:
        """A process on this host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *arguments],
            cwd=ROOT,
            env={**os.environ, **self._cluster.environment, "TMPDIR": str(self.folder), **(environment or {})},
            **options,
        )

    def start_ray(self, *, head: bool = False, cpus: int = 1) -> None:
        """Starts a Ray head, or a node that joins that of host 0."""
        place = [f"--port={GCS_PORT}", "--include-dashboard=false"] if head else [f"--address={self._cluster.gcs}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *(["--head"] if head else []), *place]
        command += [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--num-gpus=0", "--disable-usage-stats"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--block"]
        with (self.folder / "ray.log").open("ab") as log:
            self._children.append(self.start(*command, stdout=log, stderr=log))

    def processes(self) -> list[psutil.Process]:
        """All that run on this host now."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def runs(self, words: str) -> bool:
        """Whether a process with these words in its command line runs here."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    return True
        return False

    def kill(self) -> None:
        """The host is gone: every process of it gets SIGKILL."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)
        while self._children:
            self._children.pop().wait()

    def cut_off(self) -> None:
        """Takes the link down; the processes go on without the others."""
        _ip("-n", self._cluster.switch, "link", "set", self._link, "down")
        self.is_cut_off = True

    def plug_back(self) -> None:
        """Takes the link up again."""
        _ip("-n", self._cluster.switch, "link", "set", self._link, "up")
        self.is_cut_off = False


class Cluster:
    """Some hosts; host 0 holds the head. When the block is left, nothing of it is left.

    Args:
        cpus: that Ray shall believe each host to have.
    """

    def __init__(self, *cpus: int) -> None:
        self._cpus = cpus
        self.prefix = f"mdc{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.folder = Path(tempfile.mkdtemp(prefix="mdc", dir="/tmp"))  # short: Ray's sockets lie below
        token = self.folder / "token"
        token.write_text("of-the-tests-alone")
        self.environment = {
            **RAY_SETTINGS,
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.hosts: list[Host] = []

    @property
    def gcs(self) -> str:
        return f"{self.hosts[0].address}:{GCS_PORT}"

    def __enter__(self) -> "Cluster":
        _sweep()
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            for number in range(len(self._cpus)):
                self.hosts.append(Host(self, number))
                self.hosts[-1].plug_in()
            self.heal()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never plugged in
                host.kill()
        for namespace in _namespaces(os.getpid()):
            _ip("netns", "del", namespace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def heal(self) -> None:
        """Gives each host that has lost its Ray, or its link, a new one, as a launcher would."""
        if self.hosts[0].runs("gcs_server"):
            broken = [host for host in self.hosts if host.is_cut_off or not host.runs("raylet")]
        else:
            broken = self.hosts
        for host in broken:
            host.kill()
            host.plug_back()
        alive = 0 if broken == self.hosts else len(self.hosts) - len(broken)
        for count, host in enumerate(broken, start=alive + 1):  # one by one: their files lie in one folder
            host.start_ray(head=host is self.hosts[0], cpus=self._cpus[self.hosts.index(host)])
            self._wait_for_nodes(count)

    def _wait_for_nodes(self, count: int) -> None:
        wait_until(lambda: self.nodes() == count, f"{count} nodes are up")

    def nodes(self) -> int:
        """Nodes that the head says to be alive."""
        listed = self.hosts[0].start(
            sys.executable, "-c", _COUNT_NODES, self.gcs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return int(listed.communicate()[0].strip() or 0)

    @contextlib.contextmanager
    def job(self, *arguments: str, host: int = 0, **environment: str) -> "Iterator[Job]":
        """`python -m ...` on a host, as a driver of this cluster."""
        process = self.hosts[host].start(
            *(sys.executable, "-m", *arguments),
            environment={"RAY_ADDRESS": self.gcs, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Job(process)
        finally:
            process.kill()
            process.communicate()


# Asks without joining the cluster.
_COUNT_NODES = """
import sys
from ray._raylet import GcsClient
print(sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values()))
"""


class Job:
    """A job that runs on a host."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines: list[str] = []

    def wait_for_line(self, start: str) -> None:
        """Reads what it tells until a line starts with these words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"the job ended without a line that starts with {start!r}:\n{''.join(self._lines)}")

    def ended(self) -> tuple[int, dict[str, Any], str]:
        """Its exit code, its JSON line, and what it told."""
        out, err = self.process.communicate()
        lines = out.splitlines()
        result = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return self.process.returncode, result, "".join(self._lines) + err


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 300.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s:g} s it is still not so that {what}")
        time.sleep(0.2)


def _namespaces(pid: int | None = None) -> list[str]:
    """Those that a process made; None: those of processes that are gone."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    matches = [match for name in names if (match := NAMESPACE.fullmatch(name))]
    return [m[0] for m in matches if (int(m[1]) == pid if pid is not None else not psutil.pid_exists(int(m[1])))]


def _sweep() -> None:
    """Ends what a test run that was killed has left."""
    for namespace in _namespaces():
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", namespace)
