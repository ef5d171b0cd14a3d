"""cluster: the Ray that a job starts for itself, and what is left of it."""

import json
import os
import subprocess
import sys

import psutil
import pytest

# A process that connects, and says what runs below it and what it has loaded.
CONNECTS = """
import json, sys
from mnist_dist.console import quiet
quiet(verbose=False)
import psutil, ray
from mnist_dist.on_ray.cluster import connected
assert "ray.data" not in sys.modules
with connected(verbose=False, meanwhile="ray.data") as have:
    alive = (child for child in psutil.Process().children(recursive=True) if child.status() != "zombie")
    below = {child.pid: child.cmdline() for child in alive}
    import ray.data
    rows = ray.data.range(3).map(lambda row: {"id": row["id"] + 1}).take_all()
print(json.dumps({"cpus": have.cpus, "below": below, "rows": [row["id"] for row in rows]}))
"""


@pytest.mark.slow
def test_a_private_ray_has_no_autoscaler_and_leaves_nothing_running() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTS], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    names = [" ".join(command) for command in said["below"].values()]
    assert any("raylet" in name for name in names)
    assert not any("/monitor.py" in name for name in names)
    assert said["rows"] == [1, 2, 3]
    assert said["cpus"] >= 1
    left = [pid for pid in map(int, said["below"]) if psutil.pid_exists(pid)]
    assert psutil.wait_procs([psutil.Process(pid) for pid in left], timeout=10)[1] == []
