"""The limits of reduced precision: what `auto` takes, what is refused although it was asked for by name, and which
images decide it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Recorder
from test_calibration import bundle_at, labels_of, numbers, write_table
from test_choice import NAN, choice, needs, prepare
from test_choice import Steps as FakeSteps

from mnist_dist import processor
from mnist_dist.config import EnginePrecision
from mnist_dist.engines import conversion
from mnist_dist.engines.calibration import (
    FEW_ROWS,
    MAX_IMAGES,
    RANGE_IMAGES,
    calibration_images,
    range_images,
    range_rows,
    unseen_by_ranges,
)
from mnist_dist.engines.choice import fastest, why_refused
from mnist_dist.engines.conversion import Answers, compare
from mnist_dist.errors import ConfigError, StepFailed
from mnist_dist.models.bundle import Bundle
from mnist_dist.score_config import EngineConfig
from mnist_dist.session import Session

# N = compared images, K = classes

REDUCED: list[EnginePrecision] = ["bfloat16", "int8"]


# --- what is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize(
    ("facts", "accepted", "why"),
    [
        ({"accuracy_loss": 0.01, "agreement": 0.98}, None, None),
        ({"accuracy_loss": 0.011}, None, "differs and accuracy is 1.10 points lower"),
        ({"agreement": 0.979}, None, "the top class of 2.10% of the 1,000 calibration images differs"),
        ({"accuracy_loss": -0.2, "agreement": 0.7}, None, "the top class of 30.00%"),
        ({"accuracy_loss": None, "agreement": 0.98}, None, None),
        ({"accuracy_loss": None, "agreement": 0.9799}, None, "the top class of 2.01%"),
        ({"images": 50, "agreement": 0.98}, None, None),
        ({"accuracy_loss": NAN}, None, "accuracy is nan points lower"),
        ({"agreement": NAN}, None, "the top class of nan%"),
        ({"max_abs_difference": NAN}, None, "a probability is NaN"),
        ({"max_abs_difference": NAN}, 100.0, "a probability is NaN"),
        ({"source": "random", "images": 256}, None, "the bundle has no calibration images to compare on"),
        ({"source": "random", "images": 256, "accuracy_loss": None, "agreement": 0.97}, 3.0, None),
        ({"source": "random", "images": 256, "accuracy_loss": None, "agreement": 0.96}, 3.0, "4.00% of the 256 random"),
        ({"accuracy_loss": 0.07, "agreement": 0.5}, 7.0, None),
        ({"accuracy_loss": 0.071, "agreement": 1.0}, 7.0, "accuracy is 7.10 points lower"),
        ({"accuracy_loss": 0.001, "agreement": 1.0}, 0.0, "accuracy is 0.10 points lower"),
        ({"accuracy_loss": 0.0, "agreement": 0.9}, 0.0, None),
        ({"accuracy_loss": None, "agreement": 0.93}, 7.0, None),
        ({"accuracy_loss": None, "agreement": 0.92}, 7.0, "the top class of 8.00%"),
        (
            {"accuracy_loss": None, "agreement": 0.93, "multi_label": True},
            6.0,
            "the predicted classes of 7.00% of the 1,000 calibration images differ",
        ),
    ],
)
def test_what_a_precision_asked_for_by_name_may_lose(
    precision: EnginePrecision, facts: dict[str, Any], accepted: float | None, why: str | None
) -> None:
    found = why_refused(choice(precision=precision, **facts), accept_points=accepted)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize("precision", REDUCED)
def test_auto_is_stricter_than_a_name(precision: EnginePrecision) -> None:
    lossy: list[dict[str, Any]] = [{"agreement": 0.994}, {"accuracy_loss": 0.003}]
    for facts in lossy:
        found = choice(precision=precision, speed=900.0, **facts)
        assert why_refused(found) is None
        assert fastest([found, choice(speed=100.0)]).precision == "float32"


@pytest.mark.parametrize("points", [-0.1, 100.1, NAN])
def test_points_are_a_percentage(points: float) -> None:
    expected = r"accept_accuracy_loss must be in \[0, 100\] points. Received: accept_accuracy_loss="
    with pytest.raises(ConfigError, match=expected):
        EngineConfig(accept_accuracy_loss=points)


# --- which images decide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [FEW_ROWS, 400, 999, 1_000, 1_100, 1_299, 1_300, 2_000, 5_000])
def test_int8_is_judged_by_other_images_than_it_was_made_from(tmp_path: Path, count: int) -> None:
    bundle = write_table(tmp_path, count)
    compared = np.concatenate(list(calibration_images(bundle, batch_size=64)))
    made_from = np.concatenate(list(range_images(bundle, batch_size=64)))
    judged = unseen_by_ranges(bundle)

    assert judged is not None
    assert len(judged) == len(compared) == min(count, MAX_IMAGES)
    assert set(numbers(made_from)).isdisjoint(numbers(compared[judged]))
    assert len(made_from) == len(range_rows(count)) == min(RANGE_IMAGES, count // 4)
    assert judged.sum() >= min(0.7 * count, 700)
    assert judged.all() == (count >= MAX_IMAGES + RANGE_IMAGES)
    rows = np.sort(numbers(made_from))
    assert rows[0] < 5
    assert rows[-1] > count - 5
    assert np.diff(rows).max() <= 2 * count / len(rows)


@pytest.mark.parametrize("count", [1, 20, FEW_ROWS - 1])
def test_few_images_serve_for_both(tmp_path: Path, count: int) -> None:
    bundle = write_table(tmp_path, count)
    assert numbers(np.concatenate(list(range_images(bundle, batch_size=7)))) == list(range(count))
    assert unseen_by_ranges(bundle) is None


def test_random_images_serve_for_both(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path)
    images = np.concatenate(list(range_images(bundle, batch_size=100)))
    np.testing.assert_array_equal(images, np.concatenate(list(calibration_images(bundle, batch_size=100))))
    assert unseen_by_ranges(bundle) is None


def test_only_images_that_are_judged_count() -> None:
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    found = np.eye(3, dtype=np.float32)[[0, 2, 2, 1]]
    labels = np.asarray([0, 1, 2, 2])
    answers = Answers(probabilities=found, labels=labels, source="calibration", images_per_s=7.0, images_per_call=4)
    check = compare(reference, answers, judged=np.asarray([True, True, True, False]))
    assert [check.images, check.agreement, check.accuracy_loss] == pytest.approx([3, 2 / 3, 1 / 3])
    same = compare(reference, answers, judged=np.asarray([True, False, True, False]))
    assert (same.images, same.max_abs_difference, same.agreement) == (2, 0.0, 1.0)


# --- on the driver ---------------------------------------------------------------------------------------------------


IMAGES, JUDGED = 1_300, 1_000


class Steps(FakeSteps):
    """Steps whose reduced precisions predict another class for some images; Keras is always right. The model has
    `convolutions`; int8 with the first of them in float32 is wrong for `wrong_with[how many]` images, if that is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wrong: dict[str, int] = {}
        self.wrong_with: dict[int, int] = {}
        self.convolutions = 0
        self.breaks_at: int | None = None

    def __call__(self, step: Any, *, title: str, session: Session) -> Any:
        if step.func.__name__ == "_quantize":
            return self.quantize(title, *step.args[2:])
        answers = super().__call__(step, title=title, session=session)
        if not isinstance(answers, Answers):
            return answers
        if title == "openvino int8":
            kept = int((Path(step.args[1]) / "kept").read_text())
            answers = replace(answers, float32_convolutions=kept)
            self.wrong[title] = self.wrong_with.get(kept, self.wrong.get(title, 0))
        classes = labels_of(IMAGES)[np.linspace(0, IMAGES - 1, JUDGED).astype(int)]
        labels = classes if answers.source == "calibration" else None
        found = classes.copy()
        found[: self.wrong.get(title, 0)] += 1
        return replace(answers, probabilities=np.eye(8, dtype=np.float32)[found], labels=labels)

    def quantize(self, title: str, target: Path, share: float) -> int:
        kept = round(share * self.convolutions)
        self.done.append(f"{title}, {kept} in float32")
        if kept == self.breaks_at:
            raise StepFailed("no such layer")
        self.write(target, "openvino")
        (target / "kept").write_text(str(kept))
        return kept


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(conversion, "run_step", steps)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: True)
    return steps


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "bundle").mkdir()
    return write_table(tmp_path / "bundle", IMAGES)


@pytest.mark.parametrize("precision", REDUCED)
def test_a_precision_that_loses_too_much_is_refused_with_what_takes_it(
    bundle: Bundle, tmp_path: Path, steps: Steps, precision: EnginePrecision
) -> None:
    needs("nncf")
    steps.wrong[f"openvino {precision}"] = 423
    expected = (
        rf"openvino {precision} does not predict what Keras predicts: the top class of 42.30% of the 1,000 calibration "
        r"images differs and accuracy is 42.30 points lower; 1 point of accuracy and 2% of the images are allowed. "
        r"--precision auto takes the fastest that agrees, --precision float32 loses nothing, "
        rf"--accept-accuracy-loss 42.3 takes it as it is. Received: precision='{precision}'"
    )
    with pytest.raises(ConfigError, match=expected) as refused:
        prepare(bundle, tmp_path / "engines", precision=precision)
    assert refused.value.exit_code == 2
    allowed = r"images differs .*; --accept-accuracy-loss 42.2 allows less. .*--accept-accuracy-loss 42.3 takes it"
    with pytest.raises(ConfigError, match=allowed):
        prepare(bundle, tmp_path / "engines", precision=precision, accept_accuracy_loss=42.2)
    console = Recorder()
    found = prepare(bundle, tmp_path / "engines", console=console, precision=precision, accept_accuracy_loss=42.3)
    assert found.precision == precision
    assert console.lines[-1].startswith(f"using openvino {precision} as requested, although the top class of 42.30%")


def test_what_is_suggested_is_accepted(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    for wrong in (21, 25, 199, 333, 999):
        steps.wrong["openvino bfloat16"] = wrong
        place = tmp_path / str(wrong)
        with pytest.raises(ConfigError, match=r"--accept-accuracy-loss [\d.]+ takes it") as refused:
            prepare(bundle, place, precision="bfloat16")
        points = float(str(refused.value).partition("--accept-accuracy-loss ")[2].split()[0])
        assert prepare(bundle, place, precision="bfloat16", accept_accuracy_loss=points).precision == "bfloat16"


def test_auto_leaves_out_what_loses_too_much_whatever_is_accepted(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.speeds["openvino bfloat16"] = 900.0
    steps.wrong["openvino bfloat16"] = 6
    for engine in ("auto", "openvino"):
        found = prepare(bundle, tmp_path / "engines", engine=engine, accept_accuracy_loss=50.0)
        assert (found.engine, found.precision) == ("openvino", "float32")
    steps.wrong["openvino bfloat16"] = 2
    assert prepare(bundle, tmp_path / "others").precision == "bfloat16"


def test_a_precision_that_nobody_named_is_no_last_resort(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.fails["openvino float32"] = StepFailed("no float32")
    steps.wrong["openvino bfloat16"] = 9
    with pytest.raises(StepFailed, match="no float32"):
        prepare(bundle, tmp_path / "engines", engine="openvino")
    assert prepare(bundle, tmp_path / "engines", precision="bfloat16").precision == "bfloat16"
    with pytest.raises(StepFailed, match="no float32"):
        prepare(bundle, tmp_path / "engines", engine="openvino")


def test_auto_takes_int8_once_it_was_asked_for_and_agrees(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    needs("nncf")
    steps.speeds["openvino int8"] = 900.0
    assert prepare(bundle, tmp_path / "engines").precision == "float32"
    assert "openvino int8" not in steps.done
    prepare(bundle, tmp_path / "engines", precision="int8")
    steps.done.clear()
    for flags in ({}, {"engine": "openvino"}, {"worth_it": False}):
        assert prepare(bundle, tmp_path / "engines", **flags).precision == "int8"
    assert prepare(bundle, tmp_path / "engines", precision="float32").precision == "float32"
    assert steps.done == []


def test_int8_that_auto_must_not_take_is_taken_by_name_only(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    needs("nncf")
    steps.speeds["openvino int8"], steps.wrong["openvino int8"] = 900.0, 8
    console = Recorder()
    assert prepare(bundle, tmp_path / "engines", precision="int8", console=console).precision == "int8"
    assert console.lines[-1].endswith("as requested, although the top class of 0.80% of the images differs")
    assert prepare(bundle, tmp_path / "engines").precision == "float32"


@pytest.mark.parametrize(
    ("wrong_with", "tried", "taken"),
    [
        ({0: 2}, [0], 0),
        ({0: 3, 2: 2}, [0, 2], 2),
        ({0: 30, 2: 11, 6: 2}, [0, 2, 6], 6),
        ({0: 30, 2: 16, 6: 10}, [0, 2, 6], 6),
        ({0: 30, 2: 10, 6: 2}, [0, 2], 2),  # That is enough for those who ask for int8, and faster.
        ({0: 9, 2: 8, 6: 2}, [0, 2], 0),
    ],
)
def test_where_int8_loses_too_much_its_first_convolutions_stay_in_float32(
    bundle: Bundle, tmp_path: Path, steps: Steps, wrong_with: dict[int, int], tried: list[int], taken: int
) -> None:
    needs("nncf")
    steps.convolutions, steps.wrong_with = 12, wrong_with
    console = Recorder()
    found = prepare(bundle, tmp_path / "engines", precision="int8", console=console)
    quantized = [f"openvino int8, {count} in float32" for count in tried]
    assert [title for title in steps.done if "in float32" in title] == quantized
    assert found.check is not None
    assert (found.check.float32_convolutions, found.check.agreement) == (taken, 1 - wrong_with[taken] / 1_000)
    assert found.name == (f"openvino int8 with {taken} convolutions in float32" if taken else "openvino int8")
    assert (Path(str(found.uri)) / "kept").read_text() == str(taken)
    assert sum(line.startswith("  openvino int8") for line in console.lines) == len(tried)
    assert prepare(bundle, tmp_path / "engines", precision="int8") == found
    assert found.noted()["engine_check"]["float32_convolutions"] == taken


def test_int8_that_nothing_mends_is_refused_with_what_was_kept(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    needs("nncf")
    steps.convolutions, steps.wrong_with = 6, {0: 400, 1: 90, 3: 300}
    expected = (
        r"openvino int8 with 1 convolution in float32 does not predict what Keras predicts: the top class of 9.00% .*"
        r"--accept-accuracy-loss 9 takes it as it is. Received: precision='int8'"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(bundle, tmp_path / "engines", precision="int8")


def test_what_cannot_be_mended_is_kept_as_it_is(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    needs("nncf")
    steps.wrong_with = {0: 10}
    without_convolutions = prepare(bundle, tmp_path / "none", precision="int8")
    assert steps.done.count("openvino int8") == 1  # compared once
    steps.convolutions, steps.breaks_at = 12, 2
    console = Recorder()
    broken = prepare(bundle, tmp_path / "broken", precision="int8", console=console)
    for found in (without_convolutions, broken):
        assert found.check is not None
        assert (found.check.float32_convolutions, found.check.agreement) == (0, 0.99)
    assert "  openvino int8 with layers in float32: left out (no such layer)" in console.lines


@pytest.mark.parametrize("precision", REDUCED)
def test_without_calibration_images_no_precision_can_be_judged(
    bundle: Bundle, tmp_path: Path, steps: Steps, precision: EnginePrecision
) -> None:
    needs("nncf")
    (bundle.path / "calibration.parquet").unlink()
    steps.convolutions = 12
    expected = (
        r"the bundle has no calibration images to compare on; by random pixels, the top class of 0.00% .* differs. "
        r".*--accept-accuracy-loss 0 takes it as it is; import the model again with --calibration FOLDER"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(bundle, tmp_path / "engines", precision=precision)
    found = prepare(bundle, tmp_path / "engines", precision=precision, accept_accuracy_loss=0.0)
    assert found.precision == precision
    assert not any(title.endswith(("2 in float32", "6 in float32")) for title in steps.done)  # nothing says what helps


def test_of_several_labels_per_image_the_sets_are_named(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.wrong["openvino bfloat16"] = 30
    several = Bundle(bundle.path, replace(bundle.info, multi_label=True))
    expected = (
        r"the predicted classes of 3.00% of the 1,000 calibration images differ; .*--accept-accuracy-loss 3 takes it"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(several, tmp_path / "engines", precision="bfloat16")
    found = prepare(several, tmp_path / "engines", precision="bfloat16", accept_accuracy_loss=3.0)
    assert str(found) == "openvino bfloat16 (same predicted classes as Keras for 97.00% of 1,000 images)"
    assert found.check is not None
    assert found.check.accuracy_loss is None
