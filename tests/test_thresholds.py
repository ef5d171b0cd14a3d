"""thresholds: the flag, the files that it names, and what is frozen with a job."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo
from mnist_dist.score_config import InputConfig, ScoreJob, TableConfig
from mnist_dist.scoring.thresholds import read_thresholds, shortest, thresholds_csv, with_thresholds

NAMES = ("ant", "bee, wild", "cat")
OF_NAMES = {"ant": 0.25, "bee, wild": 0.7, "cat": 0.125}
SPEC = ImageSpec(height_px=10, width_px=12, channels=3)
MULTI_LABEL = BundleInfo(class_names=NAMES, spec=SPEC, backbone="cnn", multi_label=True)
SINGLE_LABEL = BundleInfo(class_names=NAMES, spec=SPEC, backbone="cnn")


def job_of(threshold: float | str | None) -> ScoreJob:
    table = TableConfig(threshold=threshold)
    return ScoreJob(bundle="b", output="o", inputs=InputConfig(input=("i",)), table=table)


def write(folder: Path, suffix: str) -> str:
    """The thresholds in another order than the classes, as a file."""
    path, reverse = folder / f"t{suffix}", dict(reversed(OF_NAMES.items()))
    if suffix == ".csv":
        path.write_bytes(thresholds_csv(reverse))
    elif suffix == ".json":
        path.write_text(json.dumps(reverse))
    else:
        values = pa.array(list(reverse.values()), pa.float32())
        pq.write_table(pa.table({"threshold": values, "class": list(reverse)}), path)
    return str(path)


@pytest.mark.parametrize(("given", "threshold"), [(None, 0.5), (0.5, 0.5), (0.3, 0.3)])
def test_a_number_is_that_of_every_class(given: float | None, threshold: float) -> None:
    table = with_thresholds(job_of(given), MULTI_LABEL).table
    assert list(table.thresholds.items()) == [(name, threshold) for name in NAMES]
    assert table.is_multi_label


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_every_form_of_file_gives_the_thresholds_in_the_order_of_the_classes(tmp_path: Path, suffix: str) -> None:
    job = with_thresholds(job_of(write(tmp_path, suffix)), MULTI_LABEL)
    assert list(job.table.thresholds.items()) == list(OF_NAMES.items())


def test_the_values_decide_the_rows_and_not_where_they_stand(tmp_path: Path) -> None:
    jobs = [with_thresholds(job_of(write(tmp_path, suffix)), MULTI_LABEL) for suffix in (".csv", ".parquet")]
    assert jobs[0].settings() == jobs[1].settings()
    assert jobs[0].settings()["table"]["thresholds"] == OF_NAMES
    assert "threshold" not in jobs[0].settings()["table"]
    assert jobs[0].settings() != with_thresholds(job_of(None), MULTI_LABEL).settings()


def test_a_model_of_one_class_per_image_takes_no_threshold() -> None:
    job = job_of(None)
    assert with_thresholds(job, SINGLE_LABEL) is job
    assert not job.table.is_multi_label
    with pytest.raises(ConfigError, match=r"threshold needs a multi-label model; .*Received: threshold=0\.5"):
        with_thresholds(job_of(0.5), SINGLE_LABEL)


@pytest.mark.parametrize("threshold", [0, 1.0, -0.1, float("nan"), True])
def test_a_number_lies_between_0_and_1(threshold: float) -> None:
    with pytest.raises(ConfigError, match=rf"threshold must be a number between 0 and 1, .*threshold={threshold}"):
        TableConfig(threshold=threshold)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "class,threshold\nant,0.5\n", r"each of the 3 classes; it lacks 'bee, wild', 'cat'\. Received: 1"),
        ("t.json", '{"ant": 0.5, "bee, wild": 0.5, "cat": 0.5, "dog": 0.5}', r"has the unknown 'dog'\. Received: 4"),
        ("t.json", '{"ant": 0.5, "bee, wild": 0.5, "cat": 0.5, "cat": 0.6}', "has several thresholds for 'cat'"),
        ("t.json", '{"ant": 0.5, "bee, wild": 1, "cat": 0.5}', r"between 0 and 1\. Received: 1 for 'bee, wild'"),
        ("t.json", '{"ant": 0.5, "bee, wild": "x", "cat": 0.5}', r"between 0 and 1\. Received: 'x' for 'bee, wild'"),
        ("t.json", '{"ant": 0.5, "bee, wild": {}, "cat": 0.5}', r"between 0 and 1\. Received: \[\] for 'bee, wild'"),
        ("t.json", "[0.5, 0.5, 0.5]", "t.json: thresholds are columns class and threshold, .*: not a JSON object"),
        ("t.csv", "name,threshold\nant,0.5\n", "t.csv: thresholds are columns class and threshold.*'class'"),
        ("t.csv", "class\nant\n", "t.csv: thresholds are columns class and threshold.*'threshold'"),
        ("t.parquet", "PAR1", "t.parquet: thresholds are columns class and threshold"),
        ("t.txt", "0.5", r"or a \.csv, \.parquet, \.json file with one per class\. Received: threshold='.*t\.txt'"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_thresholds(str(tmp_path / name), NAMES)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file; .* is empty\. Received: threshold='.*gone\.csv'"):
        read_thresholds(str(tmp_path / "gone.csv"), NAMES)


def test_many_wrong_classes_are_not_all_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it lacks 'c0', 'c1', 'c2', 'c3', 'c4' and 2 more\. Received: 0 thresh"):
        read_thresholds(str(tmp_path / "t.json"), [f"c{number}" for number in range(7)])


def test_the_shortest_number_is_the_same_float32() -> None:
    values = np.random.default_rng(1).random(1_000).astype(np.float32)
    assert all(np.float32(shortest(float(value))) == value for value in values)
    assert shortest(float(np.float32(0.7))) == shortest(0.7) == 0.7
