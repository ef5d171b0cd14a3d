"""What stands on the pages of a bundle and of an evaluated table."""

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from harness import Recorder, an_epoch
from PIL import Image
from scored import described_by, one_hot, scored_rows, write_bundle_info, write_scored, write_summary

from mnist_dist.data.cache import ShardRows
from mnist_dist.data.records import Records
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.comparison_parts import Compared, model_names
from mnist_dist.evaluation.evaluate import Evaluation, evaluate
from mnist_dist.evaluation.pages import TrainingFacts, evaluation_page, training_page, write_evaluation_page
from mnist_dist.evaluation.pictures import load_pictures
from mnist_dist.evaluation.report import Example, Page, render
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo, Imported
from mnist_dist.models.layers import Layer
from mnist_dist.on_ray.training.bundling import test_metrics as metrics_of_test
from mnist_dist.on_ray.training.tested import Predicted
from mnist_dist.scoring.generations import Summary

CLASSES = ("ant", "bee", "cat")
FIGURES = {
    "training_curves",
    "confusion_matrix",
    "reliability",
    "class_distribution",
    "prediction_examples",
    "misclassified_samples",
}


def png_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_come_from_files_and_archives_and_are_none_where_they_are_gone(tmp_path: Path) -> None:
    alone, archive = tmp_path / "a.png", tmp_path / "more.tar"
    alone.write_bytes(png_bytes())
    (tmp_path / "junk.png").write_bytes(b"no image")
    with tarfile.open(archive, "w") as file:
        for name in ("x/1.png", "x/2.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png_bytes())
            file.addfile(info, io.BytesIO(png_bytes()))
    uris = [
        str(alone),
        f"{archive}!x/2.png",
        f"{archive}!x/9.png",
        str(tmp_path / "junk.png"),
        str(tmp_path / "no.png"),
    ]
    found = load_pictures(uris)
    assert found.keys() == set(uris)
    for uri, readable in zip(uris, (True, True, False, False, False), strict=True):
        picture = found[uri]
        assert (picture is not None and picture.shape == (9, 11, 3)) == readable


def test_an_archive_that_is_gone_takes_its_pictures_along(tmp_path: Path) -> None:
    assert load_pictures(["digits/all/00000"]) == {"digits/all/00000": None}
    assert load_pictures([f"{tmp_path}/gone.zip!a.png"]) == {f"{tmp_path}/gone.zip!a.png": None}


def test_large_pictures_become_small_and_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (1000, 500), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    (picture,) = load_pictures([str(tmp_path / "turned.jpg")]).values()
    assert picture is not None
    assert picture.shape == (224, 112, 3)


# --- the page of an evaluation ---------------------------------------------------------------------------------------


def summary_of(bundle: str) -> Summary:
    return Summary(
        model_id="m",
        settings={},
        described=described_by(CLASSES, bundle=bundle),
        images_per_s=None,
        number=1,
        rows=0,
        files=(),
        statuses={},
        examples={},
    )


def info_of(backbone: str) -> BundleInfo:
    spec = ImageSpec(height_px=4, width_px=5, channels=1)
    return BundleInfo(class_names=CLASSES, spec=spec, backbone=backbone)


def page_of(job: EvaluateJob) -> tuple[Evaluation, Page]:
    seen: list[Evaluation] = []

    def report(evaluation: Evaluation) -> str:
        seen.append(evaluation)
        return "page"

    evaluate(job, console=Recorder(), report=report)
    return seen[0], evaluation_page(seen[0])


def folder_of_images(tmp_path: Path) -> list[str]:
    uris = []
    for number, name in enumerate([*CLASSES, *CLASSES, "ant"]):
        path = tmp_path / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(number))
        uris.append(str(path))
    return uris


def table_of(tmp_path: Path, predicted: list[int], name: str = "table", model_id: str = "model-1") -> str:
    rows = scored_rows(folder_of_images(tmp_path), one_hot(predicted, 3), CLASSES, model_id=model_id)
    return write_scored(tmp_path / name, rows, model_id=model_id)


def test_an_evaluation_shows_its_mistakes_with_their_pictures(tmp_path: Path) -> None:
    _, page = page_of(EvaluateJob(predictions=table_of(tmp_path, [0, 1, 2, 0, 1, 0, 1])))
    assert {shown.name for shown in page.figures} == {
        "confusion_matrix",
        "reliability",
        "class_distribution",
        "misclassified_samples",
    }
    (mistakes,) = page.galleries
    assert [(one.truth, one.predicted) for one in mistakes.examples] == [(("ant",), ("bee",)), (("cat",), ("ant",))]
    assert all(one.pixels is not None for one in mistakes.examples)
    assert page.headlines[0].value == "71.43 %"
    assert "71.43\N{NO-BREAK SPACE}%" in render(page)


def test_without_truth_the_page_shows_what_there_is(tmp_path: Path) -> None:
    uris = [f"/nowhere/{number}.png" for number in range(5)]
    rows = scored_rows(uris, one_hot([0, 1, 2, 0, 1], 3), CLASSES, status=["ok"] * 4 + ["truncated"])
    _, page = page_of(EvaluateJob(predictions=write_scored(tmp_path / "table", rows)))
    assert {shown.name for shown in page.figures} == {"class_distribution", "confidence"}
    assert [headline.label for headline in page.headlines] == ["images"]
    assert [gallery.title for gallery in page.galleries] == ["Without a prediction"]
    assert any("no labels" in warning for warning in page.warnings)
    assert [link.wanted for link in page.filters] == [{"status": "truncated"}]
    assert [(one.status, one.error) for one in page.galleries[0].examples] == [("truncated", "it is truncated")]
    assert "accuracy" not in " ".join(headline.label for headline in page.headlines)


def test_two_tables_show_what_moved(tmp_path: Path) -> None:
    first = table_of(tmp_path, [0, 1, 2, 0, 1, 2, 0])
    second = table_of(tmp_path, [0, 1, 2, 0, 1, 0, 1], name="other", model_id="model-2")
    _, page = page_of(EvaluateJob(predictions=first, compare=second))
    moved = page.galleries[0]
    assert sorted((one.predicted, one.second) for one in moved.examples) == [(("ant",), ("bee",)), (("cat",), ("ant",))]
    assert moved.models == ("table", "other")
    assert [table.title for table in page.leading] == ["Side by side", "Classes of both", "Changed predictions"]
    assert page.verdict[0].startswith("table is better than other by 28.6 percentage points")


def test_the_page_is_written_with_its_figures(tmp_path: Path) -> None:
    evaluation, _ = page_of(EvaluateJob(predictions=table_of(tmp_path, [0, 1, 2, 0, 1, 2, 0])))
    uri = write_evaluation_page(evaluation)
    assert uri == f"{evaluation.output}/report.html"
    assert "100.00\N{NO-BREAK SPACE}%" in Path(uri).read_text()
    assert (Path(evaluation.output) / "figures" / "confusion_matrix.png").exists()


def test_pages_name_the_models_of_a_comparison() -> None:
    def table(uri: str, bundle: str = "", backbone: str = "cnn") -> Compared:
        return Compared(uri=uri, model_id=uri, summary=summary_of(bundle) if bundle else None, bundle=info_of(backbone))

    runs = table("/p/one", "s3://b/runs/small/bundle"), table("/p/two", "/runs/large/bundle")
    assert model_names(*runs) == ("small", "large")
    alike = table("/p/one", "/x/run/bundle"), table("/p/two", "/y/run/bundle", "resnet50")
    assert model_names(*alike) == ("run (cnn)", "run (resnet50)")
    same = table("/p/one", "/x/run/bundle"), table("/p/two", "/x/run/bundle")
    assert model_names(*same) == ("one", "two")
    assert model_names(table("/a/table"), table("/b/table")) == ("/a/table", "/b/table")


def test_metrics_come_before_images_and_a_comparison_before_all(tmp_path: Path) -> None:
    first = table_of(tmp_path, [0, 1, 2, 0, 1, 2, 1])
    second = table_of(tmp_path, [0, 1, 2, 0, 1, 0, 1], name="other", model_id="model-2")
    html = render(page_of(EvaluateJob(predictions=first, compare=second))[1])
    leading = ['class="verdict"', ">Side by side<", ">table on its own<", ">Confusion matrix<", ">Classes<"]
    places = [html.index(part) for part in (*leading, ">All metrics<", ">What was run<", ">Predicted differently ")]
    assert places == sorted(places)
    assert "<img" not in html[: html.index(">What was run<")]


def test_what_the_verdict_says_is_no_warning(tmp_path: Path) -> None:
    uris = folder_of_images(tmp_path)
    status = ["ok"] * 6 + ["truncated"]
    rows = scored_rows(uris, one_hot([0, 1, 2, 0, 1, 0, 1], 3), CLASSES, status=status)
    evaluation, page = page_of(EvaluateJob(predictions=write_scored(tmp_path / "table", rows)))
    assert list(evaluation.notes) == ["1 image with a label has no prediction, and is not counted"]
    assert page.warnings == []
    assert page.verdict[-1].endswith("1 could not be predicted (1 truncated).")


# --- the page of a bundle --------------------------------------------------------------------------------------------


@pytest.fixture
def records() -> Records:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 1), np.uint8)
    index = pa.table({"uri": [f"digits/{number}" for number in range(9)], "label": pa.array([0, 1, 2] * 3, pa.int32())})
    return Records(ShardRows([pixels]), index, CLASSES, ImageSpec(height_px=4, width_px=5, channels=1))


def logits_of(predicted: list[int]) -> npt.NDArray[np.float32]:
    return np.log(one_hot(predicted, 3, confidence=0.9)) + 7


def test_metrics_of_the_test_images_are_those_of_their_logits(records: Records) -> None:
    rows = np.array([2, 4, 5, 7])
    tested = Predicted(rows=rows, labels=np.array([2, 1, 2, 1], np.int32), logits=logits_of([2, 1, 0, 1]))
    assert tested.metrics["accuracy"] == 0.75
    assert tested.metrics["loss"] == pytest.approx(-(3 * np.log(0.9) + np.log(0.05)) / 4, rel=1e-5)
    np.testing.assert_allclose(tested.probabilities.sum(axis=1), 1, rtol=1e-6)
    metrics = metrics_of_test(tested, records)
    assert (metrics.accuracy, metrics.images) == (0.75, 4)
    assert metrics.log_loss == pytest.approx(tested.metrics["loss"], rel=1e-5)
    assert [one.uri for one in metrics.mistakes] == ["digits/5"]


def test_extreme_logits_have_a_finite_loss() -> None:
    logits = np.array([[500.0, -500.0], [-900.0, 900.0]], np.float32)
    tested = Predicted(rows=np.arange(2), labels=np.array([1, 1], np.int32), logits=logits)
    assert tested.metrics == {"loss": 500.0, "accuracy": 0.5}


def test_a_bundles_page_holds_everything(records: Records) -> None:
    tested = Predicted(
        rows=np.arange(9), labels=np.array([0, 1, 2] * 3, np.int32), logits=logits_of([0, 1, 2] * 2 + [1] * 3)
    )
    metrics = metrics_of_test(tested, records)
    example = Example(name="digits/1", predicted=("ant",), confidence=0.9, truth=("bee",), pixels=records.pixels[1])
    facts = TrainingFacts(
        name="a run",
        command="python -m jobs.train <x>",
        bundle=BundleInfo(
            class_names=records.class_names,
            spec=records.spec,
            backbone="cnn",
            config={"fit": {"seed": 3}},
            data_fingerprint="f" * 64,
            validation={"accuracy": 0.5, "loss": 1.0},
            versions={"keras": "3.15"},
            created_at="2030-01-02",
        ),
        history=[an_epoch(number) for number in (1, 2, 3)],
        counts={"train": np.array([5, 6, 7]), "test": np.array([3, 3, 3])},
        samples=[],
        predictions=[example],
        pictures=lambda uri: records.pixels[int(uri.partition("/")[2])],
        layers=[Layer(name="conv1", kind="Conv2D", output="8x8x32", parameters=1234)],
        parameters=1234,
        workers=2,
        precision="float32",
        images_per_s=None,
        seconds=12.3,
    )
    page = training_page(facts, metrics)
    assert {shown.name for shown in page.figures} == FIGURES
    assert set(page.files) == {"model_architecture.txt", "classification_report.txt"}
    (architecture,) = page.details
    assert architecture.columns == ("layer", "parameters", "output", "type")
    assert architecture.rows == [("conv1", "1,234", "8x8x32", "Conv2D")]
    assert page.verdict[0] == "The model is right on 77.8 % of 9 test images."
    html = render(page).replace("\N{NO-BREAK SPACE}", " ")
    for expected in ("a run", "&lt;x&gt;", "77.78 %", "1,234", "not measured", "8x8x32", "f" * 64, "keras"):
        assert expected in html


def test_the_page_of_a_table_says_how_it_came_to_be(tmp_path: Path) -> None:
    table = table_of(tmp_path, [0, 1, 2, 0, 1, 2, 0])
    bundle = write_bundle_info(
        tmp_path / "bundle",
        CLASSES,
        data_fingerprint="f" * 64,
        versions={"keras": "3.15"},
        config={"fit": {"seed": 3}},
    )
    write_summary(table, bundle=bundle)
    _, page = page_of(EvaluateJob(predictions=table))
    facts = dict(page.facts)
    assert (facts["engine"], facts["backbone"], facts["version of keras"]) == ("keras", "cnn", "3.15")
    assert facts["training data fingerprint"] == "f" * 64
    assert '"seed": 3' in page.texts["Configuration"]
    (tmp_path / "bundle" / "bundle.json").write_text("no JSON")
    assert "backbone" not in dict(page_of(EvaluateJob(predictions=table))[1].facts)


def test_the_page_of_a_table_says_what_was_imported_and_assumed(tmp_path: Path) -> None:
    table = table_of(tmp_path, [0, 1, 2, 0, 1, 2, 0])
    imported = Imported(
        source="models/birds.onnx",
        kind="onnx",
        scale=(1.0,),
        offset=(0.0,),
        bgr=False,
        activation="softmax",
        assumed=("The colours are RGB.", "Softmax follows."),
    )
    bundle = write_bundle_info(tmp_path / "bundle", CLASSES, backbone="birds", imported=imported)
    write_summary(table, bundle=bundle)
    facts = page_of(EvaluateJob(predictions=table))[1].facts
    assert ("imported from", "models/birds.onnx (onnx)") in facts
    assumed = [value for name, value in facts if name == "assumed at its import"]
    assert assumed == ["The colours are RGB.", "Softmax follows."]
    assert not {"weights", "training data fingerprint"} & dict(facts).keys()
