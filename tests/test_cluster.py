"""cluster: what each worker gets, which storage every node sees, and the Ray that a job starts for itself."""

import json
import os
import subprocess
import sys
import time

import pytest
from harness import is_alive

from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.on_ray.cluster import (
    PRIVATE_TRAIN_SETTINGS,
    SUBMISSION_VARIABLE,
    Resources,
    Share,
    check_storage,
    share,
)

LAPTOP = Resources(by_node=((8, 0),))
GPUS = Resources(by_node=((16, 2), (14, 2)))
THREES = Resources(by_node=((3, 0), (3, 0), (3, 0)))
MIXED = Resources(by_node=((16, 0), (4, 1), (5, 1)))


@pytest.fixture(autouse=True)
def _not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUBMISSION_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("have", "asked", "expected"),
    [
        (LAPTOP, {}, Share(workers=1, cpus=8, gpus=0)),
        (LAPTOP, {"workers": 3}, Share(workers=3, cpus=2, gpus=0)),
        (LAPTOP, {"workers": 8}, Share(workers=8, cpus=1, gpus=0)),
        (LAPTOP, {"workers": 16, "cpus_per_worker": 0.5}, Share(workers=16, cpus=0.5, gpus=0)),
        (LAPTOP, {"cpus_per_worker": 3}, Share(workers=1, cpus=3, gpus=0)),
        (LAPTOP, {"gpu": False}, Share(workers=1, cpus=8, gpus=0)),
        (THREES, {}, Share(workers=1, cpus=3, gpus=0)),  # no worker is larger than a node
        (THREES, {"workers": 4}, Share(workers=4, cpus=1, gpus=0)),
        (THREES, {"workers": 12, "cpus_per_worker": 0.75}, Share(workers=12, cpus=0.75, gpus=0)),
        (GPUS, {}, Share(workers=4, cpus=7, gpus=1)),
        (GPUS, {"workers": 3}, Share(workers=3, cpus=8, gpus=1)),
        (MIXED, {}, Share(workers=2, cpus=4, gpus=1)),  # the large node has no GPU
        (GPUS, {"workers": 4, "cpus_per_worker": 1.5}, Share(workers=4, cpus=1.5, gpus=1)),
        (GPUS, {"gpus_per_worker": 2}, Share(workers=2, cpus=14, gpus=2)),
        (GPUS, {"gpus_per_worker": 2, "workers": 1}, Share(workers=1, cpus=16, gpus=2)),
        (GPUS, {"gpu": False, "workers": 5}, Share(workers=5, cpus=5, gpus=0)),
    ],
)
def test_workers_share_what_is_there(have: Resources, asked: dict[str, object], expected: Share) -> None:
    options = {"workers": None, "cpus_per_worker": None, "gpu": None, **asked}
    assert share(have, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("have", "asked", "message"),
    [
        (
            LAPTOP,
            {"workers": 9},
            r"^9 workers of 1 CPU each do not fit; the cluster has 1 node\(s\), 8 CPUs, 0 GPUs "
            r"\(room for 8; .*--workers.*"
            r"--cpus-per-worker.*--wait-for-nodes-s\)\. Received: workers=9$",
        ),
        (LAPTOP, {"workers": 3, "cpus_per_worker": 2.75}, r"^3 workers of 2\.75 CPU each .*room for 2; .*workers=3$"),
        (
            LAPTOP,
            {"gpu": True},
            r"^each worker needs a GPU, but the cluster has 1 node\(s\), 8 CPUs, 0 GPUs\. Received: workers=1$",
        ),
        (THREES, {"workers": 4, "cpus_per_worker": 2}, r"^4 workers of 2 CPU each .* 9 CPUs.*room for 3;.*workers=4$"),
        (THREES, {"cpus_per_worker": 3.5}, r"^1 workers of 3\.5 CPU each .*room for 0; .*Received: workers=1$"),
        (MIXED, {"cpus_per_worker": 5}, r"^2 workers of 5 CPU and a GPU each .*room for 1; .*Received: workers=2$"),
        (GPUS, {"workers": 5}, r"^each worker needs a GPU, but .* 2 node\(s\), 30 CPUs, 4 GPUs\. Received: workers=5$"),
    ],
)
def test_more_than_there_is_is_refused(have: Resources, asked: dict[str, object], message: str) -> None:
    options = {"workers": None, "cpus_per_worker": None, "gpu": None, **asked}
    with pytest.raises(ResourceError, match=message):
        share(have, **options)  # type: ignore[arg-type]


SEEN_BY_ALL = [("s3://bucket/runs", False), ("s3://bucket/runs", True), ("/mnt/nfs/runs", True)]
SEEN_BY_ONE = [("runs", False), ("/tmp/runs", False), ("runs", True)]


@pytest.mark.parametrize(("storage", "is_shared"), SEEN_BY_ALL + SEEN_BY_ONE)
def test_one_node_may_write_anywhere(storage: str, is_shared: bool) -> None:
    check_storage(storage, is_shared=is_shared, nodes=1)


@pytest.mark.parametrize(("storage", "is_shared"), SEEN_BY_ALL)
def test_many_nodes_and_submitted_jobs_may_write_where_all_see_it(
    monkeypatch: pytest.MonkeyPatch, storage: str, is_shared: bool
) -> None:
    check_storage(storage, is_shared=is_shared, nodes=3)
    monkeypatch.setenv(SUBMISSION_VARIABLE, "{}")
    check_storage(storage, is_shared=is_shared, nodes=1)


@pytest.mark.parametrize(("storage", "is_shared"), SEEN_BY_ONE)
def test_what_one_node_sees_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, storage: str, is_shared: bool
) -> None:
    remedy = rf"a bucket prefix .*, or the absolute path of a shared folder with --storage-is-shared\. .*='{storage}'$"
    with pytest.raises(ConfigError, match=rf"^A cluster of 3 nodes needs a storage that every node sees: {remedy}"):
        check_storage(storage, is_shared=is_shared, nodes=3)
    monkeypatch.setenv(SUBMISSION_VARIABLE, "{}")
    with pytest.raises(ConfigError, match=rf"^A submitted job needs a storage that every node sees: {remedy}"):
        check_storage(storage, is_shared=is_shared)


def test_the_variable_of_a_submission_is_the_one_that_ray_sets() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert SUBMISSION_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR


# A process that connects, and says what runs below it and what it has loaded.
CONNECTS = """
import json, os, sys
from mnist_dist.console import quiet
quiet(verbose=False)
import psutil, ray
from mnist_dist.on_ray.cluster import connected
assert "ray.data" not in sys.modules
with connected(verbose=False, meanwhile="ray.data") as have:
    alive = (child for child in psutil.Process().children(recursive=True) if child.status() != "zombie")
    below = {child.pid: child.cmdline() for child in alive}
    watcher = os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
    import ray.data
    rows = ray.data.range(3).map(lambda row: {"id": row["id"] + 1}).take_all()
assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
print(json.dumps({"cpus": have.cpus, "below": below, "rows": [row["id"] for row in rows], "watcher": watcher}))
"""


@pytest.mark.slow
def test_a_private_ray_has_no_autoscaler_and_leaves_nothing_running() -> None:
    without = ("RAY_ADDRESS", *PRIVATE_TRAIN_SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run([sys.executable, "-c", CONNECTS], env=environment, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    names = [" ".join(command) for command in said["below"].values()]
    assert any("raylet" in name for name in names)
    assert not any("/monitor.py" in name for name in names)
    assert sorted(said["rows"]) == [1, 2, 3]  # blocks come as they are done
    assert said["cpus"] >= 1
    assert said["watcher"] == "0"
    while any(map(is_alive, map(int, said["below"]))):
        time.sleep(0.1)
