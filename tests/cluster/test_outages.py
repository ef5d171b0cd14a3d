"""Jobs on a cluster of three hosts, some of which are killed or cut off; every host has its own address and Ray.

The hosts are network namespaces (`hosts.py`), which need root. Host 0 has the head and the driver. CI runs a short
form; `-m chaos` also cuts hosts off, and kills the head.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from harness import CLASSES, run_command, write_spread_bundle
from hosts import Cluster, Host, wait_until, why_not
from PIL import Image

from mnist_dist.on_ray.search.tuning import DIED
from mnist_dist.scoring.predictions import read_predictions
from mnist_dist.training.checkpoints import read_checkpoint
from mnist_dist.training.runs import Run
from mnist_dist.tuning.trials import TrialRecords

_REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

IMAGES, SHARD, TRIALS = 300, 10, 9
Weights = list[npt.NDArray[Any]]
Rows = dict[str, tuple[str, list[float] | None]]
chaos = pytest.mark.chaos
OUTAGES = [pytest.param(Host.kill, id="killed"), pytest.param(Host.cut_off, id="cut off", marks=chaos)]


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[Cluster]:
    with Cluster(1, 1, 1) as cluster:
        yield cluster


@pytest.fixture
def cluster(three_hosts: Cluster) -> Cluster:
    """Three hosts of a CPU each, all well."""
    three_hosts.heal()
    return three_hosts


# --- training --------------------------------------------------------------------------------------------------------


def train(storage: Path) -> list[str]:
    """A training of two workers, two phases, dropout and augmentation."""
    settings = (
        "--name run --limit 1600 --dropout 0.3 --epochs 4 10 --learning-rate 1e-3 5e-4 --schedule cosine "
        "--batch-size 50 --augmentation digits --precision float32 --workers 2 --cpus-per-worker 1 --storage-is-shared"
    )
    return ["jobs.train", "quickstart", "--storage", str(storage), *settings.split()]


def final_weights(storage: Path) -> Weights:
    checkpoint = Run(str(storage / "run")).newest_checkpoint()
    assert checkpoint is not None
    return read_checkpoint(Path(checkpoint)).weights


@pytest.fixture(scope="module")
def weights_of_one_host(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Both workers on this machine, without any of the hosts."""
    storage = tmp_path_factory.mktemp("one-host")
    code, _, err = run_command(*train(storage))
    assert code == 0, err
    return final_weights(storage)


def check_same(storage: Path, theirs: Weights) -> None:
    for ours, other in zip(final_weights(storage), theirs, strict=True):
        assert np.linalg.norm(ours - other) <= 1e-5 * np.linalg.norm(other)


def hosts_that_run(cluster: Cluster, words: str) -> list[Host]:
    return [host for host in cluster.hosts if host.runs(words)]


def test_training_on_two_hosts_gives_the_weights_of_one(
    cluster: Cluster, tmp_path: Path, weights_of_one_host: Weights
) -> None:
    with cluster.job(*train(tmp_path)) as job:
        job.wait_for_line("epoch 1")
        assert len(hosts_that_run(cluster, "RayTrainWorker")) == 2
        code, result, err = job.ended()
    assert code == 0, err
    assert result["workers"] == 2
    check_same(tmp_path, weights_of_one_host)


@pytest.mark.parametrize("outage", OUTAGES)
def test_training_goes_on_when_a_host_is_gone(
    cluster: Cluster, tmp_path: Path, weights_of_one_host: Weights, outage: Callable[[Host], None]
) -> None:
    with cluster.job(*train(tmp_path)) as job:
        job.wait_for_line("epoch 3")
        outage([host for host in hosts_that_run(cluster, "RayTrainWorker") if host is not cluster.hosts[0]][-1])
        code, _, err = job.ended()
    assert code == 0, err
    check_same(tmp_path, weights_of_one_host)


@chaos
def test_training_submitted_again_goes_on_when_the_head_was_killed(
    cluster: Cluster, tmp_path: Path, weights_of_one_host: Weights
) -> None:
    with cluster.job(*train(tmp_path)) as job:
        job.wait_for_line("epoch 3")
        cluster.hosts[0].kill()
    cluster.heal()
    with cluster.job(*train(tmp_path)) as job:
        code, _, err = job.ended()
    assert code == 0, err
    assert "Resuming" in err
    check_same(tmp_path, weights_of_one_host)


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (12, 14, 3), dtype=np.uint8)) for _ in range(100)]
    return write_spread_bundle(tmp_path_factory.mktemp("bundle") / "bundle", images=images, seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are slow to decode, and a broken one."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(IMAGES - 1):
        small = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        large = small.resize((1_400, 1_200), Image.Resampling.NEAREST)
        large.save(folder / f"{number:03d}.png", compress_level=1)
    (folder / "text.png").write_text("no image at all, whatever its name says")
    return folder


def score(bundle: Path, images: Path, output: Path) -> list[str]:
    command = ["jobs.score", "--bundle", str(bundle), "--input", str(images), "--output", str(output)]
    return [*command, "--shard-size", str(SHARD), "--storage-is-shared", "--cpus-per-actor", "1"]


def rows_of(output: Path) -> Rows:
    table = read_predictions(str(output)).to_pylist()
    assert len(table) == len({row["uri"] for row in table}) == IMAGES
    return {row["uri"]: (row["status"], row["probabilities"]) for row in table}


@pytest.fixture(scope="module")
def rows_of_one_host(tmp_path_factory: pytest.TempPathFactory, bundle: Path, images: Path) -> Rows:
    output = tmp_path_factory.mktemp("one-host") / "table"
    code, _, err = run_command(*score(bundle, images, output))
    assert code == 0, err
    rows = rows_of(output)
    assert Counter(status for status, _ in rows.values()) == {"ok": IMAGES - 1, "unsupported": 1}
    assert all(len(probabilities) == len(CLASSES) for _, probabilities in rows.values() if probabilities)
    return rows


def check_rows(output: Path, theirs: Rows) -> None:
    ours = rows_of(output)
    assert ours.keys() == theirs.keys()
    for uri, (status, probabilities) in ours.items():
        assert status == theirs[uri][0]
        assert probabilities == (None if theirs[uri][1] is None else pytest.approx(theirs[uri][1], abs=1e-5))


def wait_for_shards(output: Path, count: int) -> None:
    wait_until(lambda: len(list(output.glob("_work/g*/shard-*.parquet"))) >= count, f"{count} shards are done")


@pytest.mark.parametrize("outage", OUTAGES)
def test_scoring_gives_a_row_for_each_image_when_a_host_is_gone(
    cluster: Cluster, tmp_path: Path, bundle: Path, images: Path, rows_of_one_host: Rows, outage: Callable[[Host], None]
) -> None:
    output = tmp_path / "table"
    with cluster.job(*score(bundle, images, output)) as job:
        wait_for_shards(output, 4)
        assert len(hosts_that_run(cluster, "ShardActor")) == 3
        outage(cluster.hosts[2])
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["ok"]) == (IMAGES, IMAGES - 1)
    check_rows(output, rows_of_one_host)


def test_scoring_waits_for_the_nodes_that_it_asked_for(
    cluster: Cluster, tmp_path: Path, bundle: Path, images: Path, rows_of_one_host: Rows
) -> None:
    late, output = cluster.hosts[2], tmp_path / "table"
    late.kill()
    wait_until(lambda: cluster.nodes() == 2, "the third host is missed")
    with cluster.job(*score(bundle, images, output), "--actors", "3", "--wait-for-nodes-s", "120") as job:
        job.wait_for_line("waiting up to 120 s for room for 3 x 1 CPU")
        late.start_ray()
        code, _, err = job.ended()
    assert code == 0, err
    assert "3 actor(s)" in err
    check_rows(output, rows_of_one_host)


@chaos
def test_scoring_submitted_again_goes_on_when_the_head_was_killed(
    cluster: Cluster, tmp_path: Path, bundle: Path, images: Path, rows_of_one_host: Rows
) -> None:
    output = tmp_path / "table"
    with cluster.job(*score(bundle, images, output)) as job:
        wait_for_shards(output, 4)
        cluster.hosts[0].kill()
    cluster.heal()
    with cluster.job(*score(bundle, images, output)) as job:
        code, _, err = job.ended()
    assert code == 0, err
    check_rows(output, rows_of_one_host)


# --- searching -------------------------------------------------------------------------------------------------------


def search(storage: Path) -> list[str]:
    settings = f"--name run --limit 1200 --trials {TRIALS} --trial-epochs 12 --scheduler none --finalists 1 --workers 2"
    return ["jobs.search", "search-digits", "--storage", str(storage), "--storage-is-shared", *settings.split()]


def statuses(storage: Path) -> list[str]:
    """Of the trials that are recorded."""
    records = TrialRecords(str(storage / "run" / "trials"))
    return [trial.status for trial in records.read().values()]


@chaos
@pytest.mark.parametrize("outage", OUTAGES)
def test_searching_records_and_goes_on_when_a_host_is_gone(
    cluster: Cluster, tmp_path: Path, outage: Callable[[Host], None]
) -> None:
    with cluster.job(*search(tmp_path)) as job:
        wait_until(lambda: any(status != "running" for status in statuses(tmp_path)), "a trial has ended")
        outage(cluster.hosts[2])
        code, result, err = job.ended()
    assert code == 0, err
    board = pq.read_table(result["leaderboard"]).to_pylist()
    assert sorted(row["trial"] for row in board) == list(range(TRIALS))
    lost = [row for row in board if row["status"] == "failed"]
    assert [row["error"] for row in lost] == [DIED]
    assert result["trials"] == TRIALS
    assert result["best"]["test_accuracy"] > 0.5
