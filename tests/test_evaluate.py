"""evaluate: the job from a table to its results, and the command as a person types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness import ROOT, Recorder, run_command
from scored import one_hot, scored_rows, write_bundle_info, write_mark, write_scored

from mnist_dist.commands import evaluate as evaluate_command
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import Evaluation, evaluate
from mnist_dist.evaluation.metrics import Metrics
from mnist_dist.score_config import ScoreJob
from mnist_dist.scoring.predictions import MARK, Mark, table_uri
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

NAMES = ("ant", "bee", "cat")
KEYS = {"report", "images", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss", "ece"}
PREDICTED = [0, 0, 1, 1, 2, 2, 0, 0]
TRUTH = [0, 0, 1, 1, 2, 1, 2, 0]
STATUS = ["ok"] * 7 + ["truncated"]
URIS = [f"/data/{NAMES[code]}/{number}.png" for number, code in enumerate(TRUTH)]


def table_of(folder: Path, *, uris: list[str] = URIS, predicted: list[int] = PREDICTED, **other: Any) -> str:
    rows = scored_rows(uris, one_hot(predicted, 3, confidence=0.75), NAMES, status=STATUS)
    return write_scored(folder, rows.slice(0, 3), rows.slice(3), **other)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Eight images in the folders of their classes, of which seven are ok and five right."""
    return table_of(tmp_path / "predictions")


def run(**fields: Any) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The job's answer, the lines that a person sees, and what `metrics.json` says."""
    console = Recorder()
    result = evaluate(EvaluateJob(**fields), console=console)
    return result, console.lines, json.loads(ANYWHERE.read_bytes(join(result["output"], "metrics.json")))


def test_folders_are_the_truth(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    result, lines, values = run(predictions=table)
    assert result.keys() >= KEYS
    assert (result["images"], result["accuracy"]) == (8, pytest.approx(5 / 7))
    assert result["accuracy_low"] < 5 / 7 < result["accuracy_high"]
    assert result["ece"] == pytest.approx(abs(0.75 - 5 / 7), abs=1e-6)
    assert values["metrics"]["confusion"] == [[2, 0, 0], [0, 2, 1], [1, 0, 1]]
    assert values["metrics"]["statuses"] == {"ok": 7, "truncated": 1}
    assert values["truth"] == "the folders of the images"
    assert values["comparison"] is None
    text = Path(f"{table}-evaluation/classification_report.txt").read_text()
    assert "    accuracy                         0.7143         7\n" in text
    assert "note: 1 image with a label has no prediction, and is not counted" in lines
    assert lines[-1] == f"results: {table}-evaluation"
    shown = capsys.readouterr().err
    assert "71.43 % (35.89 % to 91.78 %) of 7" in shown
    assert "8: 7 ok, 1 truncated" in shown


def test_a_file_of_labels_comes_before_the_folders(table: str, tmp_path: Path) -> None:
    lines = [f"{uri},{NAMES[code]}" for uri, code in zip(URIS[:4], PREDICTED, strict=False)]
    (tmp_path / "labels.csv").write_text("\n".join(["uri,label", *lines, f"{URIS[4]},gnu"]))
    result, said, values = run(predictions=table, labels=str(tmp_path / "labels.csv"))
    assert result["accuracy"] == 1.0
    assert (values["metrics"]["evaluated"], values["metrics"]["unknown"]) == (4, {"gnu": 1})
    assert f"note: 3 images have no label in {tmp_path / 'labels.csv'}, such as {URIS[5]!r}" in said
    assert "note: 1 image has a label that is no class, and is not counted: 'gnu'" in said


@pytest.mark.parametrize("folder", ["/photos", "/photos/new"])
def test_without_truth_it_says_so(tmp_path: Path, folder: str) -> None:
    table = table_of(tmp_path / "t", uris=[f"{folder}/{number}.png" for number in range(8)])
    result, lines, values = run(predictions=table)
    assert {name: result[name] for name in KEYS - {"report", "images"}} == dict.fromkeys(KEYS - {"report", "images"})
    assert any(
        line.startswith("note: no labels: the folders of the images are not named like classes") for line in lines
    )
    assert (values["truth"], values["metrics"]["unknown_labels"], values["metrics"]["labelled"]) == (None, 0, 0)
    assert values["metrics"]["predicted"] == [3, 2, 2]
    assert not Path(f"{table}-evaluation/classification_report.txt").exists()


def test_classes_that_nobody_predicted_are_told(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", predicted=[0, 0, 1, 1, 0, 0, 0, 0])
    result, lines, values = run(predictions=table)
    assert values["metrics"]["unknown"] == {"cat": 2}
    assert any(line.startswith("note: 1 of 3 classes were never predicted, so their names") for line in lines)
    assert result["accuracy"] == pytest.approx(4 / 5)
    result, lines, values = run(predictions=table, bundle=write_bundle_info(tmp_path / "bundle", NAMES))
    assert result["accuracy"] == pytest.approx(4 / 7)
    assert not any("never predicted" in line for line in lines)


def test_rows_that_repeat_a_uri_are_named(tmp_path: Path) -> None:
    uris = [*URIS[:5], URIS[1], URIS[0], URIS[1]]
    _, lines, values = run(predictions=table_of(tmp_path / "t", uris=uris))
    assert values["metrics"]["duplicates"] == 3
    assert values["metrics"]["duplicate_examples"] == [URIS[0], URIS[1]]
    assert f"note: 3 rows are duplicates of another row: {URIS[0]!r}, {URIS[1]!r}" in lines


def test_two_tables_are_compared(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = table_of(tmp_path / "other", predicted=TRUTH, uris=[*URIS[:6], "/data/ant/6.png", "/x"], model_id="model-2")
    _, lines, values = run(predictions=table, compare=other)
    assert values["comparison"]["second_right"] == 1
    assert values["comparison"]["mcnemar"] == {"method": "exact", "statistic": None, "p_value": 1.0}
    assert "note: the models are model-1 and model-2" in lines
    assert any(line.startswith("The second model is better than the first model by ") for line in lines)
    assert f"note: 2 images are only in the first table: {URIS[6]!r}, {URIS[7]!r}" in lines
    assert "p = 1 (exact)" in capsys.readouterr().err


def test_a_report_is_written_by_whoever_is_handed_in(table: str) -> None:
    seen: list[Evaluation] = []

    def report(evaluation: Evaluation) -> str:
        seen.append(evaluation)
        return f"{evaluation.output}/report.html"

    result = evaluate(EvaluateJob(predictions=table), console=Recorder(), report=report)
    assert result["report"] == f"{table}-evaluation/report.html"
    assert isinstance(seen[0].metrics, Metrics)
    assert seen[0].metrics.accuracy == pytest.approx(5 / 7)
    assert seen[0].truth == "the folders of the images"


def test_tables_and_results_may_be_on_s3(s3: str) -> None:
    rows = scored_rows(URIS, one_hot(PREDICTED, 3), NAMES)
    ANYWHERE.write_bytes(f"{s3}/t/table/part", _parquet(rows))
    write_mark(f"{s3}/t", Mark(number=1, files=("part",), rows=8, model_id="m", failed=True))
    result, lines, _ = run(predictions=f"{s3}/t")
    assert result["accuracy"] == pytest.approx(6 / 8)
    assert result["output"] == f"{s3}/t-evaluation"
    assert any("the scoring job failed, because the table has too many bad rows" in line for line in lines)


def _parquet(rows: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer)
    return bytes(buffer.getvalue().to_pybytes())


def test_a_table_that_is_not_finished_is_refused(table: str) -> None:
    Path(table_uri(table, 1, MARK)).unlink()
    with pytest.raises(DataError, match="there is no prediction table"):
        run(predictions=table)
    assert not Path(f"{table}-evaluation").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output": "t"}, "output must lie outside the table.*Received: output='t', predictions='t'"),
        ({"output": "t/x"}, "output must lie outside the table"),
        ({"compare": "./t"}, "compare must name another table. Received: compare='./t'"),
        ({"top": -1}, "top must be 0 or a number of images. Received: top=-1"),
        (
            {"predictions": ""},
            "predictions must be a folder or a bucket prefix, or input must name images. Received: predictions=''",
        ),
        ({"label_column": ""}, "label_column must be a column name. Received: label_column=''"),
        ({"tta": ("flip",)}, "tta needs input: a table is evaluated as it is"),
        ({"threshold": 0.3}, "threshold needs input: a table is evaluated with the threshold that it was made with"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateJob(**{"predictions": "t", **fields})


def test_images_are_scored_first_with_the_settings_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list[ScoreJob]()
    monkeypatch.setattr("mnist_dist.on_ray.scoring.score.score", lambda job, **_: jobs.append(job))
    job = EvaluateJob(bundle="b", input=("digits",), output="o", tta=("shift",), threshold=0.3)

    evaluate_command._score(job, Recorder())

    (scored,) = jobs
    assert (scored.bundle, scored.inputs.input) == ("b", ("digits",))
    assert (scored.engine.tta, scored.table.threshold) == (("shift",), 0.3)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_its_json(table: str) -> None:
    code, result, err = run_command("jobs.evaluate", "--predictions", table)
    assert code == 0
    assert result["job"] == "evaluate"
    assert result.keys() >= KEYS
    assert result["macro_f1"] == pytest.approx((0.8 + 0.8 + 0.5) / 3)
    assert [line for line in err.splitlines() if line.startswith(("accuracy", "macro F1", "log loss", "ECE", "cat"))]


def test_the_command_refuses_what_is_not_there(tmp_path: Path) -> None:
    code, result, err = run_command("jobs.evaluate", "--predictions", str(tmp_path / "gone"))
    assert code == 2
    assert "there is no prediction table" in result["error"]
    assert "Traceback" not in err


def test_evaluating_loads_neither_ray_nor_a_framework(table: str) -> None:
    script = (
        "import sys; from mnist_dist.commands.evaluate import main;"
        "main(['--predictions', sys.argv[1]], program='mnist-dist evaluate');"
        "print(sorted({'ray', 'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, table]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
