"""The table of the reference systems, from finished runs."""

import json
from pathlib import Path

import pytest
from harness import Recorder

from benchmarks import reference, search
from benchmarks.reference import REFERENCE_SYSTEMS, ReferenceBenchmark
from benchmarks.search import SearchBenchmark
from mnist_dist.errors import ConfigError
from mnist_dist.recipes import TRAINING_RECIPES


def finish(storage: Path, name: str, *, recipe: str, accuracy: float | None, loss: float = 0.5) -> None:
    folder = storage / name
    folder.mkdir()
    result = {"recipe": recipe, "test_accuracy": accuracy, "test_loss": loss, "train_images": 90, "backbone": "cnn"}
    (folder / "result.json").write_text(json.dumps(result))


def test_every_reference_system_has_a_recipe() -> None:
    assert {system.recipe for system in REFERENCE_SYSTEMS} <= TRAINING_RECIPES.keys()


def test_runs_of_one_recipe_are_brought_together(tmp_path: Path) -> None:
    finish(tmp_path, "a", recipe="mnist-cnn", accuracy=0.98, loss=0.1)
    finish(tmp_path, "b", recipe="mnist-cnn", accuracy=0.96, loss=0.3)
    finish(tmp_path, "c", recipe="mnist-mlp", accuracy=0.90)
    finish(tmp_path, "d", recipe="quickstart", accuracy=0.5)
    (tmp_path / "a" / "deeper").mkdir()
    finish(tmp_path / "a", "deeper/e", recipe="mnist-cnn", accuracy=0.1)
    result = reference.measure(ReferenceBenchmark(storage=str(tmp_path)), console=Recorder())
    rows = {row["recipe"]: row for row in result["rows"]}
    assert len(rows) == len(REFERENCE_SYSTEMS)
    cnn = rows["mnist-cnn"]
    assert (cnn["runs"], cnn["accuracy"], cnn["loss"]) == (2, pytest.approx(0.97), pytest.approx(0.2))
    table = reference.table(result)
    assert "**97.00 %** (96.00 to 98.00, 2 runs)" in table
    assert "**90.00 %** |" in table
    assert table.count("not run") == len(REFERENCE_SYSTEMS) - 2


def test_no_finished_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no finished run of mnist-vgg16, .* Received: storage="):
        reference.measure(ReferenceBenchmark(storage=str(tmp_path)), console=Recorder())


# --- the benchmark of searching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cases": ()}, r"^cases must be among cache, vgg16"),
        ({"trials": 0}, r"^trials must be at least 1\. Received: trials=0"),
        ({"peer_trials": -1}, r"^peer_trials must be 0 or above"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchBenchmark(**fields)  # type: ignore[arg-type]  # one table for fields of all types


def test_the_table_of_searching_shows_both_cases() -> None:
    row = {"seconds": 12.34, "per_trial_s": 0.411, "best": 0.9}
    vgg16 = {"trials": 100, "images": 9_000, "features_s": 200.0, "trials_s": 50.0, "of_pass": 1.25}
    result = {"machine": "2 cores", "date": "2030-01-02", "cache": {"rows": {"KerasTuner": row}}, "vgg16": vgg16}
    table = search.table(result)
    assert "| KerasTuner | 12.3 | 0.41 | 0.9000 |" in table
    assert "100 heads on VGG16's features of 9,000 images: one pass of the backbone 200.0 s," in table
    assert "together 1.25 of the pass" in table


@pytest.mark.chaos
def test_trials_are_measured_with_and_without_the_cache() -> None:
    benchmark = SearchBenchmark(cases=("cache",), trials=2, epochs=1, small_images=150, peer_trials=0)
    found = search.measure(benchmark, console=Recorder())["cache"]
    assert list(found["rows"]) == ["with the cache", "without it"]
    assert all(row["seconds"] > 0 and 0 <= row["best"] <= 1 for row in found["rows"].values())
