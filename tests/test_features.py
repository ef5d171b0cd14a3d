"""features: a frozen backbone's outputs, computed once, are what the phase of the head would compute itself."""

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from harness import Recorder, private_ray, run_command

from mnist_dist.config import (
    DataConfig,
    DecodeConfig,
    FeatureType,
    FitConfig,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    RunConfig,
    TrainJob,
)
from mnist_dist.console import Stop
from mnist_dist.data.cache import Cache, ShardRows, column_of
from mnist_dist.data.records import RecordPlan, Records, open_records, plan_records
from mnist_dist.data.records import finish as finish_records
from mnist_dist.errors import ConfigError, DataError, Interrupted, WeightsError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.classifier import build_classifier, build_head_alone
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.data.features import compute_missing
from mnist_dist.on_ray.training.train import train
from mnist_dist.session import Session
from mnist_dist.sources.source import image_spec, open_source
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.training.checkpoints import Checkpoint
from mnist_dist.training.features import (
    Extractor,
    FeaturePlan,
    FeatureRows,
    KerasFeatures,
    open_features,
    plan_features,
)
from mnist_dist.training.feed import Images, World
from mnist_dist.training.host import Measured, Position
from mnist_dist.training.loop import Trainer
from mnist_dist.training.phase import TrainTask

# D = features of an image
COUNT, TRAIN, VALIDATION, CLASSES = 661, 503, 97, ("a", "b", "c")
SHARD_SIZES = (256, 256, 88)  # of the 600 images of training and validation
SPEC = ImageSpec(height_px=8, width_px=9, channels=1)
MLP = ModelConfig(backbone="mlp")
MLP_WIDTH = 64
HEADED = ModelConfig(backbone="mlp", hidden_units=17, dropout=0.3)
MOBILENET = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=32, hidden_units=19, dropout=0.2)
SENTINEL = 7.5  # what no backbone here computes for every value of a shard


@pytest.fixture(scope="module")
def images() -> Images:
    """Noise, brighter from class to class."""
    random = np.random.default_rng(2)
    order = random.permutation(COUNT)
    labels = random.integers(0, 3, COUNT).astype(np.int32)
    noise = random.integers(0, 156, (COUNT, 8, 9, 1), dtype=np.uint8)
    return Images(
        pixels=noise + (50 * labels).astype(np.uint8).reshape(-1, 1, 1, 1),
        labels=labels,
        train=order[:TRAIN],
        validation=order[TRAIN : TRAIN + VALIDATION],
        test=order[TRAIN + VALIDATION :],
    )


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "runs")


def index_of(pixels: Any, *, uris: str = "image") -> pa.Table:
    """The columns of the records' index that may matter."""
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    return pa.table({"uri": [f"{uris}-{row}.png" for row in range(len(digests))], "digest": digests})


def records_plan(
    spec: ImageSpec = SPEC, *, storage: str = "runs", class_names: tuple[str, ...] = CLASSES
) -> RecordPlan:
    cache = Cache(what="records", storage=storage, key="some", rows=COUNT, min_shard_rows=64)
    return RecordPlan(cache=cache, spec=spec, limits=DecodeConfig(max_pixels=1_000), class_names=class_names)


def planned(images: Images, root: str | Path, **fields: Any) -> FeaturePlan:
    """Features of the images that are trained on and validated with; fields are those of `plan_features`."""
    options: dict[str, Any] = {
        "model": MLP,
        "records": records_plan(),
        "index": index_of(images.pixels),
        "rows": np.concatenate([images.train, images.validation]),
        "precision": "float32",
        "stored_as": "float16",
        "seed": 5,
        "root": str(root),
    }
    options |= fields
    return plan_features(options.pop("model"), **options)


def extractor(plan: FeaturePlan, images: Images) -> Extractor:
    return Extractor(plan, pixels=images.pixels, call=KerasFeatures(plan))


def computed(plan: FeaturePlan, images: Images) -> FeaturePlan:
    """The plan, after all that it plans was done."""
    extracting = extractor(plan, images)
    for shard in plan.cache.missing():
        extracting.store(shard)
    plan.cache.finish(plan.model)
    return plan


def features_of(images: Images, folder: Path, **fields: Any) -> Images:
    """The same images with their features for pixels."""
    plan = computed(planned(images, folder, **fields), images)
    return replace(images, pixels=open_features(plan, local_dir=folder))


def put_sentinel(plan: FeaturePlan, width: int) -> None:
    """Stores a shard 1 that no backbone would compute."""
    plan.cache.put(1, pa.table({"features": column_of(np.full((256, width), SENTINEL, np.float16))}))


def names(uri: str) -> list[str]:
    return sorted(entry.uri.removeprefix(f"{uri}/") for entry in ANYWHERE.list_entries(uri))


def write_weights(
    path: Path, *, model: ModelConfig = MLP, seed: int = 0, change: Callable[[Any], Any] | None = None
) -> str:
    """A `.weights.h5` file of a backbone's initial weights, its last bias changed; gives its path."""
    backbone = build_classifier(model, spec=SPEC, num_classes=3, seed=seed).backbone
    if change is not None:
        *others, bias = backbone.get_weights()
        backbone.set_weights([*others, change(bias)])
    backbone.save_weights(path)
    return str(path)


# --- with the cache as without it ------------------------------------------------------------------------------------


class Quiet:
    """A host that keeps nothing and never wishes to stop."""

    def progress(self, _: Position) -> bool:
        return False

    def epoch_ended(self, epoch: Epoch) -> None:
        pass

    def measured(self, _: Measured) -> bool:
        return False

    def save(self, checkpoint: Checkpoint) -> None:
        pass


class Counted:
    """Rows that count how often they are asked for."""

    def __init__(self, pixels: Any) -> None:
        self._pixels, self.asked = pixels, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._pixels.shape)

    def __getitem__(self, rows: npt.NDArray[np.integer[Any]], /) -> npt.NDArray[Any]:
        self.asked += 1
        return np.asarray(self._pixels[rows])


def head_task(
    images: Images, *, features: Images | None = None, model: ModelConfig = HEADED, **fields: Any
) -> TrainTask:
    """Two epochs of the head in batches that divide neither split; fields are those of `TrainTask` and `TrainJob`."""
    job = TrainJob(
        model=model,
        phases=PhasesConfig(epochs=(2,), learning_rate=(0.01,), trainable=("head",)),
        optimizer=OptimizerConfig(optimizer="sgd", momentum=0.9),
        fit=FitConfig(batch_size=31, seed=5),
    )
    of_job = {name: fields.pop(name) for name in list(fields) if name in asdict(job)}
    job = replace(job, **of_job)
    return TrainTask(job=job, spec=SPEC, class_names=CLASSES, images=images, features=features, **fields)


def history(task: TrainTask) -> list[Epoch]:
    outcome = Trainer(task, host=Quiet(), world=World()).run()
    assert outcome.finished
    return outcome.state.history


def check_same(ours: list[Epoch], theirs: list[Epoch], *, tolerance: float) -> None:
    """Losses within the relative tolerance; accuracies within two images, which may lie on a border of classes."""
    assert [line.phase for line in ours] == [line.phase for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=tolerance)
        assert mine.val_loss == pytest.approx(other.val_loss, rel=tolerance)
        assert mine.accuracy == pytest.approx(other.accuracy, abs=2.1 / TRAIN)
        assert mine.val_accuracy == pytest.approx(other.val_accuracy, abs=2.1 / VALIDATION)


STORED = [("float16", 1e-3), ("float32", 1e-5)]


HEAD_THEN_TUNED = PhasesConfig(epochs=(2, 1), learning_rate=(0.01, 0.002), trainable=("head", "dense2"))


@pytest.fixture(scope="module")
def without_cache(images: Images) -> list[Epoch]:
    """The history of two epochs of the head and one of fine-tuning, all of them on pixels."""
    lines = history(head_task(images, phases=HEAD_THEN_TUNED))
    assert [line.phase for line in lines] == ["head", "head", "fine-tune"]
    assert lines[2].loss < lines[1].loss < lines[0].loss
    return lines


@pytest.mark.parametrize(("stored_as", "tolerance"), STORED)
def test_the_head_learns_from_features_what_it_learns_from_pixels_and_a_fine_tune_goes_on_from_it(
    images: Images,
    without_cache: list[Epoch],
    tmp_path: Path,
    stored_as: FeatureType,
    tolerance: float,
) -> None:
    features = features_of(images, tmp_path, model=HEADED, stored_as=stored_as)
    ours = history(head_task(images, phases=HEAD_THEN_TUNED, features=features))
    check_same(ours, without_cache, tolerance=tolerance)


@pytest.mark.slow
def test_the_features_of_a_network_with_batch_norm_are_those_of_inference(images: Images, tmp_path: Path) -> None:
    features = features_of(images, tmp_path, model=MOBILENET, stored_as="float32")
    ours = history(head_task(images, model=MOBILENET, features=features))
    check_same(ours, history(head_task(images, model=MOBILENET)), tolerance=1e-5)


def test_a_head_after_a_phase_that_changed_the_backbone_learns_from_the_changed_one(
    images: Images, tmp_path: Path
) -> None:
    phases = PhasesConfig(epochs=(1,), learning_rate=(0.01,), trainable=("all", "head"))
    features = features_of(images, tmp_path, model=HEADED, stored_as="float32")
    ours = history(head_task(images, phases=phases, features=features))
    check_same(ours, history(head_task(images, phases=phases)), tolerance=1e-5)


def test_a_phase_of_the_head_alone_reads_no_pixels(images: Images, tmp_path: Path) -> None:
    pixels = Counted(images.pixels)
    history(head_task(replace(images, pixels=pixels), features=features_of(images, tmp_path, model=HEADED)))
    assert pixels.asked == 0


def test_a_head_alone_learns_what_it_learns_under_its_backbone(
    images: Images, without_cache: list[Epoch], tmp_path: Path
) -> None:
    features = features_of(images, tmp_path, model=HEADED, stored_as="float32")
    alone = history(head_task(features, features=features, head_alone=True))
    check_same(alone, without_cache[:2], tolerance=1e-5)


@pytest.mark.parametrize(
    ("uses", "fields"),
    [
        (True, {}),
        (True, {"phases": PhasesConfig(trainable=("head", "block5"))}),
        (False, {"phases": PhasesConfig(trainable=("all",))}),
        (False, {"fit": FitConfig(augmentation="photos")}),
        (False, {"run": RunConfig(feature_cache=False)}),
        (False, {"run": RunConfig(dry_run=True)}),
    ],
)
def test_a_job_uses_features_for_a_head_on_images_that_never_change(uses: bool, fields: dict[str, Any]) -> None:
    job = TrainJob(phases=PhasesConfig(trainable=("head",)))
    assert replace(job, **fields).uses_features is uses


# --- the head without its backbone -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layers"),
    [(MLP, 1), (HEADED, 2), (ModelConfig(backbone="conv_base"), 2)],
    ids=["mlp", "mlp with a hidden layer", "conv_base"],
)
def test_a_head_alone_has_the_weights_of_the_head_under_its_backbone(model: ModelConfig, layers: int) -> None:
    def weights(head: keras.Model) -> list[npt.NDArray[Any]]:
        return [np.array(weight) for weight in head.get_weights()]

    whole = build_classifier(model, spec=SPEC, num_classes=3, seed=4)
    width = whole.features.output.shape[-1]
    alone = build_head_alone(model, num_features=width, num_classes=3, seed=4)
    other = build_head_alone(model, num_features=width, num_classes=3, seed=6)
    ours, theirs, others = weights(alone.head), weights(whole.head), weights(other.head)
    assert len(ours) == 2 * layers
    for mine, same, different in zip(ours[::2], theirs[::2], others[::2], strict=True):
        np.testing.assert_array_equal(mine, same)
        assert np.abs(mine - different).max() > 0.01
    assert [weight.shape for weight in ours] == [weight.shape for weight in theirs]
    assert not any(bias.any() for bias in ours[1::2] + theirs[1::2])


def test_a_head_alone_has_no_backbone() -> None:
    alone = build_head_alone(HEADED, num_features=23, num_classes=3)
    assert alone.network is alone.head
    assert (alone.model, alone.features, alone.backbone) == (None, None, None)
    assert alone.head(np.zeros((5, 23), np.float32)).shape == (5, 3)


# --- the key ---------------------------------------------------------------------------------------------------------


def with_other_pixel(images: Images, row: int) -> Pixels:
    pixels = np.array(images.pixels)
    pixels[row, 3, 4] ^= 1
    return pixels


def test_the_key_depends_on_all_that_the_features_depend_on(images: Images, tmp_path: Path) -> None:
    def key(**fields: Any) -> str:
        return planned(images, tmp_path, **fields).cache.key

    swapped = np.array(images.pixels)
    swapped[images.train[:2]] = swapped[images.train[1::-1]]
    first, second = (write_weights(tmp_path / f"{seed}.weights.h5", seed=seed) for seed in (1, 2))
    mobilenet = {"model": MOBILENET}
    keys = [
        key(),
        key(index=index_of(with_other_pixel(images, int(images.train[0])))),
        key(index=index_of(with_other_pixel(images, int(images.validation[0])))),
        key(index=index_of(swapped)),
        key(rows=images.train),
        key(rows=images.train[1:]),
        key(records=records_plan(replace(SPEC, height_px=9))),
        key(records=records_plan(replace(SPEC, channels=3))),
        key(records=records_plan(replace(SPEC, resize="crop"))),
        key(precision="bfloat16"),
        key(stored_as="float32"),
        key(seed=6),
        key(model=replace(MLP, backbone="cnn")),
        key(model=replace(MLP, image_size_px=14)),
        key(model=replace(MLP, weights=first)),
        key(model=replace(MLP, weights=second)),
        key(**mobilenet),
        key(model=replace(MOBILENET, alpha=0.5)),
        key(model=replace(MOBILENET, image_size_px=64)),
        key(model=replace(MOBILENET, pooling="max")),
        key(model=replace(MOBILENET, weights="imagenet")),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(**mobilenet) == keys[-5]


def test_the_key_depends_on_nothing_else(images: Images, tmp_path: Path) -> None:
    first = planned(images, tmp_path)
    same = [
        planned(images, tmp_path / "elsewhere"),
        planned(images, tmp_path, model=HEADED),
        planned(images, tmp_path, records=records_plan(class_names=tuple("abcdefg"))),
        planned(images, tmp_path, records=records_plan(storage="elsewhere")),
        planned(images, tmp_path, index=index_of(images.pixels, uris="s3://bucket/other")),
        planned(images, tmp_path, index=index_of(with_other_pixel(images, int(images.test[0])))),
        planned(images, tmp_path, rows=np.concatenate([images.validation, images.train])),
    ]
    assert {plan.cache.key for plan in same} == {first.cache.key}


def test_weights_are_known_by_what_the_file_holds(images: Images, tmp_path: Path) -> None:
    path = Path(write_weights(tmp_path / "base.weights.h5"))
    copy = tmp_path / "copy.weights.h5"
    copy.write_bytes(path.read_bytes())

    def key(weights: Path | str, **fields: Any) -> str:
        return planned(images, tmp_path, model=replace(MLP, weights=str(weights)), **fields).cache.key

    assert key(copy) == key(path)
    assert key(path, seed=9) == key(path), "the seed decides nothing where the weights are given"
    assert key("imagenet", seed=9) == key("imagenet")


def test_a_bundle_is_known_by_the_file_that_completes_it(images: Images, tmp_path: Path) -> None:
    bundles = [tmp_path / name for name in ("first", "copy", "other")]
    for bundle, model_id in zip(bundles, "112", strict=True):
        bundle.mkdir()
        (bundle / "bundle.json").write_text(f'{{"model_id": "{model_id}"}}')
    first, copy, other = (
        planned(images, tmp_path, model=replace(MLP, weights=str(path))).cache.key for path in bundles
    )
    assert first == copy != other


def test_weights_that_were_written_anew_have_another_key(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "base.weights.h5"
    model = replace(MLP, weights=write_weights(path, seed=1))
    before = planned(images, tmp_path, model=model).cache.key
    write_weights(path, seed=2)
    assert planned(images, tmp_path, model=model).cache.key != before


def test_weights_that_are_not_there_cannot_be_planned_with(images: Images, tmp_path: Path) -> None:
    missing = str(tmp_path / "no.weights.h5")
    with pytest.raises(FileNotFoundError, match=re.escape(missing)):
        planned(images, tmp_path, model=replace(MLP, weights=missing))


def test_a_plan_is_plain_and_crosses_processes(images: Images, tmp_path: Path) -> None:
    plan = planned(images, tmp_path)
    again = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(again.rows, plan.rows)
    assert replace(again, rows=plan.rows) == plan
    assert plan.cache.root == f"{tmp_path}/_features/{plan.cache.key[:16]}"


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_hold_the_covered_rows_in_order(images: Images, tmp_path: Path) -> None:
    plan = planned(images, tmp_path)
    covered = np.sort(np.concatenate([images.train, images.validation]))
    assert plan.cache.shards == 3
    assert tuple(len(plan.rows_of(shard)) for shard in range(3)) == SHARD_SIZES
    np.testing.assert_array_equal(np.concatenate([plan.rows_of(shard) for shard in range(3)]), covered)


def test_features_are_written_in_shards_and_opened_by_row(images: Images, root: str, tmp_path: Path) -> None:
    plan = planned(images, root)
    assert not plan.cache.is_finished()
    assert plan.cache.missing() == [0, 1, 2]
    extracting = extractor(plan, images)
    extracting.store(1)
    assert plan.cache.missing() == [0, 2]
    computed(plan, images)
    assert plan.cache.is_finished()
    assert plan.cache.missing() == []
    assert names(plan.cache.root) == ["features.json", *(f"shard-00000{shard}.arrow" for shard in range(3))]

    rows = open_features(plan, local_dir=tmp_path / "node")
    expected = build_classifier(MLP, spec=SPEC, num_classes=3, seed=5).features(
        np.asarray(images.pixels, np.float32)[images.validation]
    )
    found = rows[images.validation]
    assert found.dtype == np.float16
    assert found.shape == (VALIDATION, MLP_WIDTH)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_batch_is_filled_up_without_a_trace(images: Images, tmp_path: Path) -> None:
    some = planned(images, tmp_path, rows=images.train[:45], stored_as="float32")
    one = planned(images, tmp_path, rows=images.train[44:45], stored_as="float32")
    rows, row = (open_features(computed(plan, images), local_dir=tmp_path) for plan in (some, one))
    np.testing.assert_allclose(rows[images.train[44]], row[images.train[44]], rtol=1e-5)


def test_an_interrupted_run_is_continued_and_what_was_done_stays(images: Images, root: str, tmp_path: Path) -> None:
    plan = planned(images, root)
    put_sentinel(plan, MLP_WIDTH)
    computed(plan, images)
    rows = open_features(plan, local_dir=tmp_path / "node")
    assert (rows[plan.rows_of(1)] == SENTINEL).all()
    assert not (rows[plan.rows_of(0)] == SENTINEL).any()
    assert not (rows[plan.rows_of(2)] == SENTINEL).any()


def test_storing_twice_is_harmless(images: Images, tmp_path: Path) -> None:
    plan = planned(images, tmp_path)
    extracting = extractor(plan, images)
    extracting.store(2)
    shard = Path(plan.cache.root) / "shard-000002.arrow"
    before = shard.read_bytes()
    extracting.store(2)
    assert shard.read_bytes() == before


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered() -> FeatureRows:
    """Features of the records 3, 6, ..., 30 in shards of 4, 4 and 2; each is [record, -record]."""
    records = np.arange(3, 31, 3)
    features = np.stack([records, -records], axis=1).astype(np.float32)
    return FeatureRows(records, ShardRows([features[:4], features[4:8], features[8:]]))


INDICES: dict[str, Any] = {
    "a number": np.int64(15),
    "one": np.array([30]),
    "in order over all shards": np.arange(3, 31, 3),
    "backwards, some of them twice": np.array([30, 27, 3, 15, 12, 15, 3]),
    "steps x batch": np.array([[3, 12, 15], [27, 24, 6]]),
    "three axes": np.array([[[9], [18]], [[21], [30]]]),
    "int32": np.array([6, 24], np.int32),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_are_those_of_the_records_in_the_shape_of_the_index(numbered: FeatureRows, index: Any) -> None:
    found = numbered[index]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([index, -index.astype(np.float32)], axis=-1))


def test_rows_reach_to_the_last_record_that_is_covered(numbered: FeatureRows) -> None:
    assert numbered.shape == (31, 2)


def test_a_record_behind_the_last_one_is_refused(numbered: FeatureRows) -> None:
    with pytest.raises(IndexError, match="records without features, such as 31"):
        numbered[np.array([3, 31])]


@pytest.mark.parametrize("record", [-1, 0, 4, 29])
def test_a_record_that_is_not_covered_is_refused(numbered: FeatureRows, record: int) -> None:
    with pytest.raises((LookupError, DataError), match=str(record)):
        numbered[np.array([3, record])]


# --- values that cannot be stored ------------------------------------------------------------------------------------


def with_value(
    images: Images, folder: Path, value: float, *, stored_as: FeatureType, model: ModelConfig = MLP
) -> FeaturePlan:
    """Features of a backbone whose last weights hold `value` in one place."""

    def change(last: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(np.arange(len(last)) == 5, np.float32(value), last)

    weights = write_weights(folder / "base.weights.h5", model=model, change=change)
    return planned(images, folder, model=replace(model, weights=weights), stored_as=stored_as)


def test_values_beyond_float16_are_refused_with_what_to_do(images: Images, tmp_path: Path) -> None:
    plan = with_value(images, tmp_path, 1e5, stored_as="float16")
    expected = r"mlp reach 1e\+05, more than float16 holds\. Use --feature-type float32 or --no-feature-cache\.$"
    with pytest.raises(ConfigError, match=expected):
        extractor(plan, images).store(0)
    assert plan.cache.missing() == [0, 1, 2]


@pytest.mark.parametrize("stored_as", ["float16", "float32"])
def test_infinity_is_refused(images: Images, tmp_path: Path, stored_as: FeatureType) -> None:
    plan = with_value(images, tmp_path, np.inf, stored_as=stored_as)
    with pytest.raises(ConfigError, match=r"^mlp produces features that are not finite"):
        extractor(plan, images).store(0)
    assert plan.cache.missing() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stored_as", ["float16", "float32"])
def test_what_is_no_number_is_refused(images: Images, tmp_path: Path, stored_as: FeatureType) -> None:
    # not a backbone that ends in a ReLU: TensorFlow's makes 0 of what is no number
    model = ModelConfig(backbone="mobilenet_v3_small", image_size_px=32)
    plan = with_value(images, tmp_path, np.nan, stored_as=stored_as, model=model)
    with pytest.raises(ConfigError, match=r"^mobilenet_v3_small produces features that are not finite"):
        extractor(plan, images).store(0)
    assert plan.cache.missing() == [0, 1, 2]


def test_float32_holds_what_float16_does_not(images: Images, tmp_path: Path) -> None:
    plan = computed(with_value(images, tmp_path, 1e5, stored_as="float32"), images)
    found = open_features(plan, local_dir=tmp_path)[images.train]
    np.testing.assert_allclose(found[:, 5], 1e5, rtol=1e-3)
    assert np.isfinite(found).all()


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with private_ray(num_cpus=4):
        yield


class Digits(NamedTuple):
    plan: FeaturePlan
    records: Records


def digits(folder: Path) -> Digits:
    """Finished records of 600 digits, and a plan for the features of all of them."""
    source = open_source(DataConfig(limit=600))
    spec = image_spec(source, backbone_size_px=28, scratch_size=True, config=DataConfig())
    plan = plan_records(source, spec, storage=str(folder), limits=DecodeConfig(max_pixels=1_000))
    finish_records(plan, source)
    records = open_records(plan, local_dir=folder)
    features = plan_features(
        ModelConfig(backbone="cnn"),
        records=plan,
        index=records.index,
        rows=np.arange(600),
        precision="float32",
        stored_as="float16",
        seed=3,
        root=str(folder),
    )
    return Digits(features, records)


ONE_ACTOR = Actors(count=1, cpus=1, gpus=0, decode_in_tasks=False)


def compute(plan: FeaturePlan, *, signal_number: int | None = None) -> None:
    with Stop(Recorder()) as stop:
        stop.signal_number = signal_number
        compute_missing(plan, Session(console=Recorder(), stop=stop), actors=ONE_ACTOR)


@pytest.mark.slow
def test_ray_data_computes_the_missing_shards_as_one_process_does(cluster: None, tmp_path: Path) -> None:
    there, here = digits(tmp_path / "there"), digits(tmp_path / "here")
    assert there.plan.cache.key == here.plan.cache.key
    put_sentinel(there.plan, 128)
    compute(there.plan)
    extracting = Extractor(here.plan, pixels=here.records.pixels, call=KerasFeatures(here.plan))
    for shard in here.plan.cache.missing():
        extracting.store(shard)
    here.plan.cache.finish(here.plan.model)
    ours, theirs = (open_features(plan, local_dir=tmp_path) for plan in (there.plan, here.plan))
    for shard in (0, 2):
        rows = here.plan.rows_of(shard)
        np.testing.assert_allclose(ours[rows], theirs[rows], rtol=2e-3, atol=1e-5)
    assert (ours[here.plan.rows_of(1)] == SENTINEL).all()


@pytest.mark.slow
def test_a_signal_ends_the_work_between_shards_and_what_is_done_stays(cluster: None, tmp_path: Path) -> None:
    plan = digits(tmp_path).plan
    with pytest.raises(Interrupted, match="run the same command to resume"):
        compute(plan, signal_number=2)
    assert len(plan.cache.missing()) < 3
    assert not plan.cache.is_finished()
    compute(plan)
    assert plan.cache.is_finished()


@pytest.mark.slow
def test_a_failing_storage_ends_the_work_with_its_words(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    plan = digits(tmp_path / "runs").plan
    with pytest.raises((OSError, ConfigError), match="file"):
        compute(replace(plan, cache=replace(plan.cache, storage=str(tmp_path / "file"))))


def small_job(folder: Path, *, name: str, head: dict[str, Any] | None = None, **run: Any) -> TrainJob:
    """Two epochs of a head on the digits."""
    return TrainJob(
        data=DataConfig(limit=400),
        model=ModelConfig(backbone="cnn", **(head or {})),
        phases=PhasesConfig(epochs=(2,), learning_rate=(0.01,), trainable=("head",)),
        fit=FitConfig(batch_size=30, precision="float32"),
        run=RunConfig(storage=str(folder), name=name, workers=run.pop("workers", 1), cpus_per_worker=1, **run),
    )


def written(folder: Path) -> dict[str, int]:
    """When each file of the features was written, ns."""
    files = folder.glob("_features/*/*")
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def read_history(folder: Path, name: str) -> npt.NDArray[np.float64]:
    """Loss, accuracy and those of validation, `[epochs, 4]`."""
    text = (folder / name / "history.csv").read_text()
    assert text.startswith("epoch,phase,loss,accuracy,val_loss,val_accuracy")
    return np.loadtxt(text.splitlines(), delimiter=",", skiprows=1, usecols=(2, 3, 4, 5), ndmin=2)


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_its_workers_learn_what_one_learns_without_the_cache(
    cluster: None, tmp_path: Path
) -> None:
    train(small_job(tmp_path, name="first"), recipe="test", console=Recorder())
    before = written(tmp_path)
    assert sorted(Path(file).name for file in before) == [
        "features.json",
        *(f"shard-00000{shard}.arrow" for shard in range(2)),
    ]
    head = {"hidden_units": 23, "dropout": 0.0}
    train(small_job(tmp_path, name="second", head=head, workers=2), recipe="test", console=Recorder())
    assert written(tmp_path) == before
    train(small_job(tmp_path, name="without", head=head, feature_cache=False), recipe="test", console=Recorder())
    assert written(tmp_path) == before
    ours, theirs = read_history(tmp_path, "second"), read_history(tmp_path, "without")
    assert ours.shape == (2, 4)
    np.testing.assert_allclose(ours[:, ::2], theirs[:, ::2], rtol=1e-3)
    np.testing.assert_allclose(ours[:, 1::2], theirs[:, 1::2], atol=0.03)


@pytest.mark.slow
def test_weights_of_another_architecture_are_refused_before_the_training(cluster: None, tmp_path: Path) -> None:
    weights = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]).save_weights(weights)
    job = small_job(tmp_path, name="run", head={"weights": str(weights)})
    with pytest.raises(WeightsError, match=rf"do not fit cnn: .*{re.escape(str(weights))}"):
        train(job, recipe="test", console=Recorder())
    assert written(tmp_path) == {}


@pytest.mark.slow
def test_features_too_large_for_float16_name_the_flag(cluster: None, tmp_path: Path) -> None:
    digits_spec = ImageSpec(height_px=8, width_px=8, channels=1)
    backbone = build_classifier(ModelConfig(backbone="cnn"), spec=digits_spec, num_classes=10).backbone
    backbone.set_weights([100 * weight for weight in backbone.get_weights()])
    backbone.save_weights(tmp_path / "large.weights.h5")
    job = small_job(tmp_path, name="run", head={"weights": str(tmp_path / "large.weights.h5")})
    with pytest.raises(ConfigError, match="--feature-type float32"):
        train(job, recipe="test", console=Recorder())
    assert not list(tmp_path.glob("_features/*/features.json"))


@pytest.mark.chaos
def test_a_job_keeps_its_features_on_s3_and_finds_them_there(s3: str) -> None:
    flags = ["--limit=400", "--trainable=head", "--epochs=1", "--batch-size=30", "--workers=1"]
    before: list[Entry] = []
    for name in ("first", "second"):
        arguments = ["jobs.train", "quickstart", "--storage", s3, "--name", name, *flags]
        code, result, err = run_command(*arguments)
        assert code == 0, err
        assert result["epochs"] == 1
        entries = sorted(ANYWHERE.list_entries(f"{s3}/_features"), key=lambda entry: entry.uri)
        assert entries[0].uri.endswith("/features.json")
        assert len(entries) == 3
        assert entries == (before or entries)
        before = entries
