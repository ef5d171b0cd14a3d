"""import: what a bundle holds, that it is compared before it is written, and that the same command returns it."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from corpus import encoded
from foreign_models import CLASSES, edited, foreign_onnx
from harness import Command, run_command
from PIL import Image

import mnist_dist
from mnist_dist.errors import ConfigError, ResumeConflict
from mnist_dist.images.decoder import probe_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob, NormalizationConfig
from mnist_dist.importing.comparison import Checked, CheckTask, Compared, check, compare, logits
from mnist_dist.importing.examples import built_in_examples, list_images, read_examples
from mnist_dist.importing.expected import expected_values
from mnist_dist.importing.import_model import IMPORT_FILE
from mnist_dist.importing.onnx_graph import build_onnx
from mnist_dist.importing.onnx_models import open_onnx
from mnist_dist.importing.recipe import Recipe, recipe_of
from mnist_dist.importing.sources import digest_of

NAMES = ("ant", "bee", "cat", "dog", "eel")


def photographs(folder: Path, count: int = 10) -> Path:
    """Smooth JPEGs and PNGs of several sizes, in a folder per class."""
    random = np.random.default_rng(3)
    for number in range(count):
        small = random.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((60 + 7 * number, 50 + 11 * number), Image.Resampling.BICUBIC)
        path = folder / NAMES[number % CLASSES] / f"{number}.{'png' if number % 3 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "PNG" if number % 3 == 0 else "JPEG"))
    return folder


def by_hand(file: Path, images: Path) -> dict[str, Any]:
    """File name -> probabilities, as ten lines of a person's own code give them."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    results = {}
    for path in sorted(images.rglob("*.*")):
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - 0.5) / 0.25
        (found,) = session.run(None, {"pixels": values.transpose(2, 0, 1)[None]})
        powers = np.exp(found[0] - found[0].max())
        results[path.name] = powers / powers.sum()
    return results


def written(results: dict[str, Any], path: Path) -> Path:
    columns = {name: [float(values[index]) for values in results.values()] for index, name in enumerate(NAMES)}
    pyarrow.csv.write_csv(pa.table({"uri": list(results), **columns}), path)
    return path


def test_a_model_is_imported_with_its_images_and_predicts_as_its_owner_s_code(tmp_path: Path) -> None:
    file, images = foreign_onnx(tmp_path / "net.onnx"), photographs(tmp_path / "images")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    (images / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    expected = by_hand(file, photographs(tmp_path / "good"))
    flags: dict[str, Any] = {
        "classes": str(tmp_path / "classes.txt"),
        "mean": (0.5,),
        "std": (0.25,),
        "check_images": str(images),
        "calibration": str(images),
        "expect": str(written(expected, tmp_path / "expected.csv")),
    }

    result = mnist_dist.import_model(file, output=tmp_path / "bundle", **flags)

    bundle = result.bundle()
    values = result.values
    assert bundle.info.class_names == NAMES
    assert [found["images"] for found in values["compared"]] == [10, 10]
    assert all(found["max_abs_difference"] < 1e-5 for found in values["compared"])
    top = {name: int(np.argmax(values)) for name, values in expected.items()}
    right = sum(top[path.name] == NAMES.index(path.parent.name) for path in (tmp_path / "good").rglob("*.*"))
    assert values["accuracy"] == pytest.approx(right / 10)
    assert 0 <= values["fast_agreement"] <= 1
    calibration = pq.read_table(bundle.path / "calibration.parquet")
    assert sorted(calibration["label"].to_pylist()) == sorted(list(range(CLASSES)) * 2)
    record = json.loads((bundle.path / IMPORT_FILE).read_text())
    assert "broken.jpg" in record["left_out"][0]
    predictions = bundle.predict([str(path) for path in sorted((tmp_path / "good").rglob("*.*"))])
    names = [path.name for path in sorted((tmp_path / "good").rglob("*.*"))]
    for name, prediction in zip(names, predictions, strict=True):
        assert np.abs(prediction.probabilities - expected[name]).max() < 1e-5

    again = mnist_dist.import_model(file, output=tmp_path / "bundle", **flags)
    assert {**again.values, "seconds": 0} == {**values, "seconds": 0}
    with pytest.raises(ResumeConflict, match="activation: 'none' now, 'auto' in the run"):
        mnist_dist.import_model(file, output=tmp_path / "bundle", **flags, activation="none")


def test_a_bundle_that_predicts_something_else_is_not_written(tmp_path: Path) -> None:
    file, images = foreign_onnx(tmp_path / "net.onnx"), photographs(tmp_path / "images")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    expected = written(by_hand(file, images), tmp_path / "expected.csv")

    code, result, said = run_command(
        *("jobs.import_model", str(file), "--output", str(tmp_path / "bundle"), "--preset", "0-1"),
        *("--classes", str(tmp_path / "classes.txt")),
        *("--check-images", str(images), "--expect", str(expected)),
    )

    assert code == 1, said
    assert "does not predict what the original predicts" in result["error"]
    assert "the worst is " in result["error"]
    assert not (tmp_path / "bundle").exists()


def test_the_command_says_what_it_assumed_and_what_comes_next(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "net.onnx")

    code, result, said = run_command(
        "jobs.import_model", str(file), "--output", str(tmp_path / "bundle"), "--preset", "imagenet"
    )

    assert code == 0, said
    assert (result["classes"], result["input"], result["kind"]) == (CLASSES, [32, 32, 3], "onnx")
    for sentence in result["assumed"]:
        assert f"  assumed: {sentence}" in said
    assert "compared with the file as it is in ONNX Runtime: probabilities differ by at most" in said
    assert f"python -m jobs.score --input YOUR_IMAGES --output predictions --bundle {tmp_path / 'bundle'}" in said


def test_a_killed_import_leaves_nothing_and_the_same_command_makes_the_bundle(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "net.onnx")
    arguments = ("jobs.import_model", str(file), "--output", str(tmp_path / "bundle"), "--preset", "raw")
    with Command(*arguments) as command:
        command.until_line("net (onnx): 5 classes")  # opened, not yet built
        command.kill()
    assert not (tmp_path / "bundle").exists()

    code, result, said = run_command(*arguments)

    assert code == 0, said
    assert mnist_dist.load_bundle(tmp_path / "bundle").info.model_id == result["model_id"]
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        "model.onnx",
        "bundle.json",
        "MLmodel",
        IMPORT_FILE,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.pt", b"\x80\x04.", "weights alone are no model"),
        ("net.onnx", b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.", "not an ONNX model"),
        ("net.tflite", b"TFL3", "a model to import is a Keras model .*this is none of them"),
    ],
)
def test_what_is_no_model_is_refused_and_nothing_is_executed(
    tmp_path: Path, name: str, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        mnist_dist.import_model(tmp_path / name, output=tmp_path / "bundle", preset="raw")

    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_exist_and_what_is_taken_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        mnist_dist.import_model(tmp_path / "gone.onnx", output=tmp_path / "bundle")
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        mnist_dist.import_model(tmp_path / "gone", output=tmp_path / "bundle")
    file = foreign_onnx(tmp_path / "net.onnx")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model.onnx").write_text("of somebody else")
    with pytest.raises(ConfigError, match=r"must be new or empty\. Received: .* with \['model\.onnx'\]"):
        mnist_dist.import_model(file, output=tmp_path / "used", preset="raw")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bundle.json").write_text("{}")
    with pytest.raises(ResumeConflict, match="a bundle that was not imported"):
        mnist_dist.import_model(file, output=tmp_path / "other", preset="raw")


def test_the_model_that_is_imported_is_never_replaced_by_its_bundle(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "net" / "model.onnx")
    before = file.read_bytes()

    for output in (tmp_path / "net", tmp_path, file):
        with pytest.raises(ConfigError, match="the output must lie outside of the source"):
            mnist_dist.import_model(file, output=output, preset="raw")

    assert file.read_bytes() == before


def test_a_changed_file_behind_a_flag_is_another_import(tmp_path: Path) -> None:
    file, names = foreign_onnx(tmp_path / "net.onnx"), tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    flags: dict[str, Any] = {"output": tmp_path / "bundle", "classes": str(names), "preset": "raw"}
    mnist_dist.import_model(file, **flags)

    names.write_text("\n".join(reversed(NAMES)))
    with pytest.raises(ResumeConflict, match="classes: its content has changed"):
        mnist_dist.import_model(file, **flags)
    names.write_text("\n".join(NAMES))
    foreign_onnx(file, seed=9)
    with pytest.raises(ResumeConflict, match="source: its content has changed"):
        mnist_dist.import_model(file, **flags)


def test_external_data_belong_to_the_source(tmp_path: Path) -> None:
    plain = foreign_onnx(tmp_path / "plain.onnx")
    file = tmp_path / "net" / "net.onnx"
    file.parent.mkdir()
    onnx.save(onnx.load(str(plain)), str(file), save_as_external_data=True, location="net.bin", size_threshold=0)
    job = ImportJob(source=str(file), output="b")
    before = digest_of(job)

    (file.parent / "notes.md").write_text("for people")
    assert digest_of(job) == before
    data = bytearray((file.parent / "net.bin").read_bytes())
    data[0] ^= 1
    (file.parent / "net.bin").write_bytes(data)

    assert digest_of(job) != before


def checked(file: Path, **fields: Any) -> Checked:
    """The comparison of an import, in this process."""
    job = ImportJob(source=str(file), output="b", normalization=NormalizationConfig(preset="0-1"), **fields)
    opened = open_onnx(job, file.parent, lambda done, total: None)
    what = recipe_of(job, opened, classes=None)
    target = file.with_name("bundle.onnx")
    build_onnx(file, what, target)
    pickled = file.with_name("foreign.pickle")
    pickled.write_bytes(pickle.dumps(opened))
    task = CheckTask(
        foreign=pickled,
        recipe=what,
        model_file=target,
        rows=None,
        expect=None,
        calibration=None,
        scratch=file.with_name("check"),
    )
    return check(task, lambda done, total: None)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_model_with_a_fixed_batch_is_compared_in_such_batches(tmp_path: Path, batch: int) -> None:
    (found,) = checked(foreign_onnx(tmp_path / "net.onnx", batch=batch)).compared

    assert (found.images, found.is_same) == (12, True)


@pytest.mark.parametrize("node", [None, "pooled"])
def test_a_backbone_alone_is_compared_by_its_features(tmp_path: Path, node: str | None) -> None:
    file = foreign_onnx(tmp_path / "net.onnx")

    (found,) = checked(file, backbone_only=True, features_node=node).compared

    assert (found.agreement, found.is_same) == (None, True)


@pytest.mark.parametrize("classes", [1, 40])
def test_saturated_sigmoids_are_the_same_as_themselves(tmp_path: Path, classes: int) -> None:
    file = foreign_onnx(tmp_path / "net.onnx", classes=classes)

    def steeper(graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.name in ("dense", "bias"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 8, tensor.name))

    edited(file, graph=steeper)

    (found,) = checked(file, activation="sigmoid").compared

    assert found.is_same, found


def test_outputs_that_are_probabilities_get_no_second_activation_by_guess(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "net.onnx")

    def softmax_by_parts(graph: Any) -> None:
        graph.node.append(onnx.helper.make_node("LogSoftmax", ["logits"], ["log"], axis=1))
        graph.node.append(onnx.helper.make_node("Exp", ["log"], ["p"]))
        graph.output[0].name = "p"

    edited(file, graph=softmax_by_parts)

    with pytest.raises(ConfigError, match=r"are probabilities already, .*give --activation none"):
        checked(file)
    (found,) = checked(foreign_onnx(tmp_path / "other" / "net.onnx")).compared
    assert found.is_same


# --- the parts -------------------------------------------------------------------------------------------------------


def recipe(names: tuple[str, ...] = NAMES, *, multi_label: bool = False) -> Recipe:
    spec = ImageSpec(height_px=4, width_px=4, channels=3)
    return Recipe(
        spec=spec,
        scale=(1.0,),
        offset=(0.0,),
        bgr=False,
        activation="softmax",
        multi_label=multi_label,
        class_names=names,
    )


def probabilities(count: int = 4) -> Any:
    values = np.random.default_rng(5).random((count, CLASSES)).astype(np.float32)
    return values / values.sum(axis=1, keepdims=True)


def compared(values: Any, other: Any, what: Recipe) -> Compared:
    return compare(values, other, ["a", "b", "c", "d"][: len(values)], reference="theirs", recipe=what)


def test_a_comparison_names_the_worst_image_and_judges_by_both_tolerances() -> None:
    values = probabilities()
    other = values.copy()
    other[2, 0] += 2e-4

    assert compared(values, values, recipe()).is_same
    found = compared(values, other, recipe())
    assert (found.worst, found.is_same, found.agreement) == ("c", False, 1.0)
    assert found.max_abs_difference == pytest.approx(2e-4, rel=1e-3)


def test_logits_of_tiny_probabilities_are_compared_too() -> None:
    values = np.array([[1 - 2e-6, 1e-6, 1e-6]], np.float32)
    other = np.array([[1 - 2e-6, 1e-6, 1.1e-6]], np.float32)

    found = compared(values, other, recipe(("x", "y", "z")))

    assert found.max_abs_difference < 1e-6
    assert not found.is_same


def test_nan_is_never_the_same() -> None:
    values = probabilities()
    values[1, 1] = np.nan

    assert not compared(values, probabilities(), recipe()).is_same
    assert not compared(values, values, recipe()).is_same


def test_features_are_compared_by_their_norm() -> None:
    values = np.full((4, 3), 100, np.float32)

    found = compared(values, values + np.float32(0.05), recipe(()))

    assert found.agreement is None
    assert found.relative_difference == pytest.approx(5e-4, rel=1e-2)
    assert found.is_same


def test_logits_come_back_from_their_probabilities() -> None:
    given = np.random.default_rng(0).normal(0, 4, (3, CLASSES))
    softmax = np.exp(given) / np.exp(given).sum(axis=1, keepdims=True)

    assert np.allclose(logits(softmax, multi_label=False), given - given.mean(axis=1, keepdims=True), atol=1e-9)
    within = np.clip(given, -9.2, 9.2)
    assert np.allclose(logits(1 / (1 + np.exp(-within)), multi_label=True), within, atol=1e-6)


def test_the_built_in_images_are_the_same_every_time_and_differ_in_size(tmp_path: Path) -> None:
    first, second = built_in_examples(tmp_path / "a"), built_in_examples(tmp_path / "b")

    assert list(first.files) == list(second.files)
    assert len(first.files) == 12
    assert len({probe_image(data)[:2] for data in first.files}) > 8
    assert {probe_image(data)[2] for data in first.files} == {1, 3}


def test_images_are_thinned_out_evenly_and_labelled_by_their_folders(tmp_path: Path) -> None:
    rows = list_images(str(photographs(tmp_path / "images")), max_images=5)

    examples = read_examples(rows, NAMES, scratch=tmp_path / "scratch")

    assert len(examples.files) == 5
    assert examples.are_labelled
    for name, label in zip(examples.names, examples.labels, strict=True):
        assert label == NAMES.index(name.rsplit("/", 2)[-2])
    others = read_examples(rows, ("x", "y"), scratch=tmp_path / "others")
    assert not others.are_labelled


def test_expected_probabilities_are_matched_by_name(tmp_path: Path) -> None:
    path = written({"b.jpg": [0.1] * 5, "a.jpg": [0.2] * 5}, tmp_path / "e.csv")

    values, rows = expected_values(str(path), ["/x/a.jpg", "/x/b.jpg", "/x/c.jpg"], NAMES)

    assert rows == [1, 0]
    assert np.allclose(values[0], 0.1)
    with pytest.raises(ConfigError, match=r"not the name of exactly one check image\. Received: 'b\.jpg'"):
        expected_values(str(path), ["/x/b.jpg", "/y/b.jpg", "/x/a.jpg"], NAMES)
    with pytest.raises(ConfigError, match="there is no 'fox'"):
        expected_values(str(path), ["/x/a.jpg"], ("fox", "ant"))


def test_an_unreadable_table_of_expectations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").write_bytes(b"no")
    for name in ("e.parquet", "gone.csv"):
        with pytest.raises(ConfigError, match="the expected probabilities cannot be read"):
            expected_values(str(tmp_path / name), ["a"], NAMES)
