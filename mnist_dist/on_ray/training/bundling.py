"""The bundle and its report, which the worker of rank 0 writes at the end of a training run."""

# n = test images, K = classes

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import DEFAULT_THRESHOLD
from mnist_dist.data.records import Records
from mnist_dist.data.splits import Splits
from mnist_dist.evaluation.metric_parts import Pictures
from mnist_dist.evaluation.metrics import Accumulator, Metrics
from mnist_dist.evaluation.multi_label import MultiLabelAccumulator, MultiLabelMetrics
from mnist_dist.evaluation.pages import TrainingFacts, training_page
from mnist_dist.evaluation.report import Example, write_page
from mnist_dist.evaluation.tables import Classes, ScoredTable
from mnist_dist.models.bundle import BUNDLE_FILE, BundleInfo
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.training.finished import FinishedModel
from mnist_dist.on_ray.training.messages import UNTESTED, WorkerTask
from mnist_dist.on_ray.training.tested import Predicted
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join, shown

CALIBRATION_IMAGES = 2_000
SHOWN, SAMPLES = 24, 24


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The outcome of a finished run."""

    model: FinishedModel
    """With the best weights."""
    history: Sequence[Epoch]
    validation: Mapping[str, float]
    tested: Predicted
    precision: str
    workers: int
    images_per_s: float | None
    seconds: float


def make_bundle(task: WorkerTask, finished: Finished, records: Records, folder: Path) -> None:
    """Writes the bundle into the run, unless an attempt that was killed afterwards has already written it.

    Args:
        task: the task of the run.
        finished: the outcome of the run.
        records: the images.
        folder: a local folder, which must not exist yet.
    """
    job, bundle = task.job, join(task.run, "bundle")
    if ANYWHERE.exists(join(bundle, BUNDLE_FILE)):
        return  # a finished bundle is never overwritten
    info = finished.model.write(
        folder,
        _described(task, records, validation=finished.validation, test=finished.tested.metrics),
        history=finished.history,
        calibration=_calibration(task.splits, records) if job.run.calibration else None,
    )
    measure = test_metrics_of_sets if records.label_sets else test_metrics
    metrics: Metrics | MultiLabelMetrics = measure(finished.tested, records)
    facts = TrainingFacts(
        name=task.title or task.run.rpartition("/")[2],
        command=task.command,
        bundle=info,
        history=finished.history,
        counts=_counts(task.splits, records),
        samples=_samples(task.splits, records, seed=job.fit.seed),
        predictions=_predictions(finished.tested, records),
        pictures=_pictures(records),
        layers=finished.model.layers,
        parameters=finished.model.parameters,
        workers=finished.workers,
        precision=finished.precision,
        images_per_s=finished.images_per_s,
        seconds=finished.seconds,
    )
    write_page(training_page(facts, metrics), folder)
    task.fence.check()
    ANYWHERE.upload_folder(folder, bundle, last=BUNDLE_FILE)


def keep_untested(
    task: WorkerTask,
    model: FinishedModel,
    records: Records,
    folder: Path,
    *,
    history: Sequence[Epoch],
    validation: Mapping[str, float],
) -> None:
    """Writes a bundle without a test and a report into the run, as `untested`, unless it is there.

    Args:
        task: the task of the run.
        model: with the best weights.
        records: the images.
        folder: a local folder, which must not exist yet.
        history: the epochs.
        validation: metrics on the validation images.
    """
    bundle = join(task.run, UNTESTED)
    if ANYWHERE.exists(join(bundle, BUNDLE_FILE)):
        return
    calibration = _calibration(task.splits, records) if task.job.run.calibration else None
    model.write(
        folder, _described(task, records, validation=validation, test={}), history=history, calibration=calibration
    )
    task.fence.check()
    ANYWHERE.upload_folder(folder, bundle, last=BUNDLE_FILE)


def _described(
    task: WorkerTask, records: Records, *, validation: Mapping[str, float], test: Mapping[str, float]
) -> BundleInfo:
    """What the bundle of a run says."""
    job = task.job
    return BundleInfo(
        class_names=records.class_names,
        multi_label=job.data.has_sets,
        spec=records.spec,
        backbone=job.model.backbone,
        weights=shown(job.model.weights),
        config=job.settings(),
        data_fingerprint=task.fingerprint,
        validation=validation,
        test=test,
    )


def test_metrics(tested: Predicted, records: Records) -> Metrics:
    """The metrics of the test predictions, computed as for a prediction table."""
    probabilities = tested.probabilities
    best = probabilities.argmax(axis=1)
    names = pa.array(records.class_names)
    batch = pa.RecordBatch.from_pydict(
        {
            "uri": records.index["uri"].take(pa.array(tested.rows)).combine_chunks(),
            "status": pa.array(["ok"] * len(tested.rows), pa.string()),
            "predicted_index": pa.array(best.astype(np.int32)),
            "predicted_class": names.take(pa.array(best)),
            "confidence": pa.array(probabilities.max(axis=1)),
            "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
        }
    )
    accumulator = Accumulator(Classes(records.class_names), shown=SHOWN)
    accumulator.add(batch, names.take(pa.array(tested.labels)))
    return accumulator.metrics()


def test_metrics_of_sets(tested: Predicted, records: Records) -> MultiLabelMetrics:
    """The same where images have any number of classes."""
    batch = pa.RecordBatch.from_pydict(
        {
            "uri": records.index["uri"].take(pa.array(tested.rows)).combine_chunks(),
            "status": pa.array(["ok"] * len(tested.rows), pa.string()),
            "probabilities": pa.array(list(tested.probabilities), pa.list_(pa.float32())),
        }
    )
    table = ScoredTable(
        uri="the test images",
        schema=batch.schema,
        rows=len(batch),
        model_id="",
        failed=False,
        classes=Classes(records.class_names),
        thresholds=dict.fromkeys(records.class_names, DEFAULT_THRESHOLD),
        is_multi_label=True,
    )
    accumulator = MultiLabelAccumulator(table, shown=SHOWN)
    names = [[records.class_names[number] for number in members] for members in records.label_sets]
    accumulator.add(batch, pa.array(names, pa.list_(pa.string())).take(pa.array(tested.labels)))
    return accumulator.metrics()


def _calibration(splits: Splits, records: Records) -> pa.Table:
    """Up to 2,000 held-out images, spread evenly over validation, then test: `uri`, `label` (where each image has one
    class), `pixels` (bytes, uint8 [H, W, C] of the bundle's input)."""
    held_out = np.concatenate([splits.val, splits.test])
    count = min(CALIBRATION_IMAGES, len(held_out))
    rows = held_out[np.linspace(0, len(held_out) - 1, count).astype(np.int64)]
    chosen = records.index.take(pa.array(rows))
    pixels = [records.pixels[row].tobytes() for row in rows]
    table = pa.table({"uri": chosen["uri"], "label": chosen["label"], "pixels": pa.array(pixels, pa.binary())})
    return table.drop_columns(["label"]) if records.label_sets else table


def _counts(splits: Splits, records: Records) -> dict[str, npt.NDArray[np.int64]]:
    labels, classes, members = records.index["label"].to_numpy(), len(records.class_names), records.members
    rows_of = {"train": splits.train, "validation": splits.val, "test": splits.test}
    if members is not None:
        return {name: members[labels[rows]].sum(axis=0) for name, rows in rows_of.items()}
    return {name: np.bincount(labels[rows], minlength=classes).astype(np.int64) for name, rows in rows_of.items()}


def _samples(splits: Splits, records: Records, *, seed: int) -> list[Example]:
    """Randomly drawn training images (seeded), as evenly as possible from all classes, in class order."""
    labels, uris = records.index["label"].to_numpy(), records.index["uri"]
    drawn = np.random.default_rng(seed).permutation(splits.train)
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    of_class = labels[drawn]
    place = np.arange(len(drawn)) - np.searchsorted(of_class, of_class)  # rank of each image within its class
    rows = drawn[np.argsort(place, kind="stable")][:SAMPLES]
    return [
        Example(name=uris[int(row)].as_py(), truth=_classes_of(labels[row], records), pixels=records.pixels[row])
        for row in sorted(rows, key=lambda row: (labels[row], row))
    ]


def _predictions(tested: Predicted, records: Records) -> list[Example]:
    """Test images spread evenly over the split, with their predictions."""
    places = np.linspace(0, len(tested.rows) - 1, min(SHOWN, len(tested.rows))).astype(np.int64)
    probabilities = tested.probabilities[places]
    return [
        Example(
            name=records.index["uri"][int(tested.rows[place])].as_py(),
            predicted=_predicted(scores, records),
            confidence=float(scores.max()),
            truth=_classes_of(int(tested.labels[place]), records),
            pixels=records.pixels[tested.rows[place]],
        )
        for place, scores in zip(places, probabilities, strict=True)
    ]


def _predicted(scores: npt.NDArray[np.float32], records: Records) -> tuple[str, ...]:
    """The class, or classes, of an image."""
    if not records.label_sets:
        return (records.class_names[int(scores.argmax())],)
    return tuple(records.class_names[number] for number in np.flatnonzero(scores >= DEFAULT_THRESHOLD).tolist())


def _classes_of(label: int, records: Records) -> tuple[str, ...]:
    """The class of a label, or its classes."""
    numbers = records.label_sets[label] if records.label_sets else (label,)
    return tuple(records.class_names[number] for number in numbers)


def _pictures(records: Records) -> Pictures:
    """The pixels of images by URI."""
    uris = records.index["uri"].combine_chunks()

    def picture(uri: str) -> npt.NDArray[np.uint8] | None:
        row = uris.index(uri).as_py()
        return None if row < 0 else records.pixels[row]

    return picture
