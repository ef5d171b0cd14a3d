"""loop: a whole training in this process, stopped and restored at many places, with a host that takes notes."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import average_precision_score
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from mnist_dist.config import DataConfig, FitConfig, ModelConfig, OptimizerConfig, PhasesConfig, RunConfig, TrainJob
from mnist_dist.data.batches import epoch_order
from mnist_dist.errors import ConfigError, TrainingDiverged
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.classifier import build_classifier
from mnist_dist.models.history import Epoch, history_csv
from mnist_dist.training.backends import open_computation
from mnist_dist.training.callbacks import LogFiles
from mnist_dist.training.checkpoints import Arrays, Checkpoint, read_checkpoint, write_checkpoint
from mnist_dist.training.feed import Draws, Images, World, train_chunk
from mnist_dist.training.host import Measured, MeasuringStopped, Position
from mnist_dist.training.loop import Outcome, Trainer
from mnist_dist.training.phase import TrainTask, class_weights
from mnist_dist.training.step import StepConfig, Trained, make_optimizer

# H = height px, W = width px
COUNT, TRAIN, VALIDATION, H, W = 150, 121, 16, 8, 9
STEPS = 60  # an epoch in batches of 2
CLASSES = ("a", "b", "c")
STILL = 1e-12  # a learning rate that changes no weight
PLAIN_SGD = OptimizerConfig(optimizer="sgd", momentum=0.0)
MOMENTUM = OptimizerConfig(optimizer="sgd", momentum=0.9)


@pytest.fixture(scope="module")
def images() -> Images:
    """Noise under labels that mean nothing: it can be learnt by heart, and validation gets worse by it."""
    random = np.random.default_rng(1)
    order = random.permutation(COUNT)
    return Images(
        pixels=random.integers(0, 256, (COUNT, H, W, 1), dtype=np.uint8),
        labels=random.choice(3, COUNT, p=[0.5, 0.3, 0.2]).astype(np.int32),
        train=order[:TRAIN],
        validation=order[TRAIN : TRAIN + VALIDATION],
        test=order[TRAIN + VALIDATION :],
    )


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


class Notes:
    """A host that writes every checkpoint down, and wishes to stop from some global step on."""

    def __init__(self, folder: Path, *, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.positions: list[Position] = []
        self.lines: list[Epoch] = []
        self.seen: list[Measured] = []
        self.saved: list[Path] = []

    def progress(self, position: Position) -> bool:
        self.positions.append(position)
        done = len(self.lines) * position.steps + position.step
        return self.stop_at is not None and done >= self.stop_at

    def epoch_ended(self, epoch: Epoch) -> None:
        self.lines.append(epoch)

    def measured(self, progress: Measured) -> bool:
        self.seen.append(progress)
        return self.stop_at == 0

    def save(self, checkpoint: Checkpoint) -> None:
        folder = self.folder / f"{len(self.saved):03d}-{checkpoint.state.global_step:06d}"
        folder.mkdir(parents=True)
        write_checkpoint(folder, checkpoint)
        self.saved.append(folder)

    def checkpoints(self) -> list[Checkpoint]:
        return [read_checkpoint(folder) for folder in self.saved]


def small_task(images: Images, **fields: Any) -> TrainTask:
    """One epoch of the dense network with SGD; fields are those of `TrainTask` and of `TrainJob`."""
    job = TrainJob(
        model=ModelConfig(backbone="mlp"),
        phases=PhasesConfig(epochs=(1,), learning_rate=(0.01,)),
        optimizer=PLAIN_SGD,
        fit=FitConfig(batch_size=11, seed=5),
    )
    of_job = {name: fields.pop(name) for name in list(fields) if name in asdict(job)}
    spec = ImageSpec(height_px=H, width_px=W, channels=1)
    return TrainTask(job=replace(job, **of_job), spec=spec, class_names=CLASSES, images=images, **fields)


def run(
    task: TrainTask, folder: Path, *, stop_at: int | None = None, restored: Checkpoint | None = None
) -> tuple[Trainer, Outcome, Notes]:
    notes = Notes(folder, stop_at=stop_at)
    trainer = Trainer(task, host=notes, world=World())
    if restored is not None:
        trainer.restore(restored)
    return trainer, trainer.run(), notes


def relative_difference(ours: Arrays, theirs: Arrays) -> float:
    """Over the tensors: norm(a - b) / norm(b)."""
    return max(
        float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12) for a, b in zip(ours, theirs, strict=True)
    )


# --- what a run does -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_phases(images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Outcome, Notes]:
    phases = PhasesConfig(epochs=(2, 3), learning_rate=(0.01, 0.02), trainable=("all", "dense2"))
    schedule = OptimizerConfig(optimizer="sgd", schedule="cosine")
    return run(small_task(images, phases=phases, optimizer=schedule), tmp_path_factory.mktemp("two_phases"))


def test_the_history_has_a_line_an_epoch(two_phases: tuple[Trainer, Outcome, Notes]) -> None:
    _, outcome, notes = two_phases
    assert outcome.finished
    assert outcome.state.history == notes.lines
    assert [(line.epoch, line.phase) for line in notes.lines] == [
        *((1, "train"), (2, "train")),
        *((3, "fine-tune"), (4, "fine-tune"), (5, "fine-tune")),
    ]
    # each phase falls along a cosine of its own; a line has the rate of the epoch's last step
    falls = [peak * (1 + np.cos(np.pi * s / n)) / 2 for peak, s, n in [(0.01, 10, 22), (0.01, 21, 22), (0.02, 10, 33)]]
    assert [line.learning_rate for line in notes.lines[:3]] == pytest.approx(falls, rel=1e-6)


def test_progress_counts_from_1_within_the_phase(two_phases: tuple[Trainer, Outcome, Notes]) -> None:
    _, _, notes = two_phases
    first, last = notes.positions[0], notes.positions[-1]
    assert (first.phase, first.epoch, first.epochs, first.step, first.steps) == ("train", 1, 2, 1, 11)
    assert (last.phase, last.epoch, last.epochs, last.step, last.steps) == ("fine-tune", 3, 3, 11, 11)
    assert last.loss == notes.lines[-1].loss
    assert last.accuracy == notes.lines[-1].accuracy
    assert last.images_per_s > 0


def test_there_is_a_checkpoint_an_epoch_and_each_names_what_comes_next(
    two_phases: tuple[Trainer, Outcome, Notes],
) -> None:
    states = [checkpoint.state for checkpoint in two_phases[2].checkpoints()]
    places = [(state.phase, state.epoch, state.step, state.epochs_done, state.global_step) for state in states]
    assert places == [(0, 1, 0, 1, 11), (1, 0, 0, 2, 22), (1, 1, 0, 3, 33), (1, 2, 0, 4, 44), (2, 0, 0, 5, 55)]


def test_the_loop_takes_the_steps_that_the_pure_functions_name(images: Images, tmp_path: Path) -> None:
    """Each phase is one epoch here: the second one goes on from the first, with an optimizer of its own."""
    task = small_task(images, phases=PhasesConfig(epochs=(1,), learning_rate=(0.05, 0.02)), optimizer=MOMENTUM)
    trainer, _, _ = run(task, tmp_path)
    network = build_classifier(task.job.model, spec=task.spec, num_classes=3, seed=5).network
    for epoch, rate in enumerate((0.05, 0.02)):
        trained = Trained(
            network=network,
            optimizer=make_optimizer(MOMENTUM, network.trainable_variables),
            config=StepConfig(batch_size=11, class_weights=np.ones(3, np.float32)),
        )
        step = open_computation(World()).train_step(trained)
        order = epoch_order(TRAIN, seed=5, epoch=epoch)
        first = 11 * epoch
        chunk = train_chunk(
            images,
            order,
            steps=range(11),
            first_global_step=first,
            batch_size=11,
            seed=5,
            world=World(),
            draws=Draws(),
        )
        step(step.place(chunk, capacity=11), rates=np.full(11, rate, np.float32))
    assert relative_difference(trainer.network.get_weights(), network.get_weights()) <= 1e-6


def test_training_learns_its_images_by_heart(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(40,), learning_rate=(3e-3,))
    notes = run(small_task(images, phases=phases, optimizer=OptimizerConfig()), tmp_path)[2]
    assert notes.lines[0].accuracy < 0.6
    assert notes.lines[-1].accuracy > 0.95
    assert notes.lines[-1].loss < 0.3 < notes.lines[-1].val_loss


def test_validation_metrics_are_those_of_the_weights_after_the_epoch(
    two_phases: tuple[Trainer, Outcome, Notes],
) -> None:
    trainer, _, notes = two_phases
    images = trainer.task.images
    pixels, labels = images.pixels[images.validation].astype(np.float32), images.labels[images.validation]
    for checkpoint, line in zip(notes.checkpoints(), notes.lines, strict=True):
        trainer.network.set_weights(checkpoint.weights)
        logits = trainer.network(pixels, training=False)
        losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        assert line.val_loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
        assert line.val_accuracy == np.mean(np.argmax(logits, axis=1) == labels)


def test_a_split_is_evaluated_with_the_network_given(two_phases: tuple[Trainer, Outcome, Notes]) -> None:
    trainer, outcome, _ = two_phases
    trainer.network.set_weights(outcome.best)
    assert outcome.state.best is not None
    found = trainer.evaluate(trainer.network)
    assert found["loss"] == pytest.approx(outcome.state.best.val_loss, rel=1e-6)
    assert found["accuracy"] == outcome.state.best.val_accuracy


def test_how_far_the_finished_network_is_measured_is_reported(images: Images, tmp_path: Path) -> None:
    trainer, _, notes = run(small_task(images, fit=FitConfig(batch_size=5)), tmp_path)
    assert notes.seen == []
    trainer.evaluate(trainer.network)
    trainer.predict(images.test, trainer.network)
    for split, rows in (("validation", images.validation), ("test", images.test)):
        done = [seen.done for seen in notes.seen if seen.split == split]
        assert done == sorted(set(done))
        assert done[-1] == len(rows) > done[0] > 0
    notes.stop_at = 0
    for measure in (trainer.evaluate, lambda network: trainer.predict(images.test, network)):
        with pytest.raises(MeasuringStopped):
            measure(trainer.network)
    trainer.world = World(rank=0, workers=2)  # The other one would wait.
    trainer.measured("test", 3, 9)


def test_a_dry_run_takes_one_step_of_each_phase(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(1,), trainable=("head", "all"))
    _, outcome, notes = run(small_task(images, phases=phases, steps_limit=1), tmp_path)
    assert outcome.finished
    assert [(p.phase, p.epoch, p.epochs, p.step, p.steps) for p in notes.positions] == [
        ("head", 1, 1, 1, 1),
        ("fine-tune", 1, 1, 1, 1),
    ]


def test_the_step_computes_in_bfloat16_where_it_is_told_to(images: Images, tmp_path: Path) -> None:
    trainer, outcome, notes = run(small_task(images, precision="bfloat16"), tmp_path)
    assert trainer.built.classifier.backbone.layers[-1].compute_dtype == "bfloat16"
    assert np.isfinite(notes.lines[0].val_loss)
    assert {array.dtype for array in outcome.best} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("batch_size", "workers"), [(122, 1), (2, 3)])
def test_a_batch_that_does_not_fit_is_refused(images: Images, tmp_path: Path, batch_size: int, workers: int) -> None:
    task = small_task(images, fit=FitConfig(batch_size=batch_size))
    expected = (
        rf"at least the number of workers \({workers}\) and at most .* \(121\)\. Received: batch_size={batch_size}$"
    )
    with pytest.raises(ConfigError, match=expected):
        Trainer(task, host=Notes(tmp_path), world=World(workers=workers))


def test_class_weights_are_those_of_scikit_learn(images: Images) -> None:
    labels = images.labels[images.train]
    balanced = small_task(images, optimizer=replace(PLAIN_SGD, class_weights="balanced"))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(balanced) == pytest.approx(expected, rel=1e-6)
    plain = small_task(images)
    assert class_weights(plain).tolist() == [1.0, 1.0, 1.0]
    assert class_weights(replace(balanced, class_names=(*CLASSES, "never"))).shape == (4,)


# --- the best epoch, phases, callbacks -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["val_loss", slow("val_accuracy")])
def test_the_best_epoch_is_chosen_on_validation_and_the_next_phase_starts_from_it(
    images: Images, tmp_path: Path, metric: Any
) -> None:
    phases = PhasesConfig(epochs=(6, 1), learning_rate=(0.1, STILL))
    fit = FitConfig(batch_size=11, seed=5, best_metric=metric)
    trainer, outcome, notes = run(small_task(images, phases=phases, fit=fit), tmp_path)
    values = [getattr(line, metric) for line in notes.lines[:6]]
    best = int(np.argmin(values) if metric == "val_loss" else np.argmax(values))
    assert best < 5, "the last epoch is the best: this proves nothing"
    assert outcome.state.best == notes.lines[best]
    weights = [checkpoint.weights for checkpoint in notes.checkpoints()]
    assert relative_difference(outcome.best, weights[best]) == 0
    assert relative_difference(weights[5], weights[best]) > 1e-3
    assert relative_difference(trainer.network.get_weights(), weights[best]) <= 1e-6


def test_the_head_phase_leaves_the_backbone_as_it_was(images: Images, tmp_path: Path) -> None:
    task = small_task(
        images, model=ModelConfig(backbone="cnn_bn"), phases=PhasesConfig(trainable=("head",), epochs=(1,))
    )
    trainer = Trainer(task, host=Notes(tmp_path), world=World())
    backbone, head = trainer.built.classifier.backbone.get_weights(), trainer.built.classifier.head.get_weights()
    trainer.run()
    assert relative_difference(trainer.built.classifier.backbone.get_weights(), backbone) == 0
    assert relative_difference(trainer.built.classifier.head.get_weights(), head) > 0


def test_early_stopping_ends_its_phase_and_the_next_one_begins_afresh(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(9, 2), learning_rate=(STILL, STILL))
    fit = FitConfig(batch_size=11, early_stopping_patience=2)
    _, outcome, notes = run(small_task(images, phases=phases, fit=fit), tmp_path)
    assert outcome.finished
    assert [line.phase for line in notes.lines] == ["train"] * 3 + ["fine-tune"] * 2


@pytest.mark.slow
def test_a_plateau_lowers_the_rate_also_after_a_restore(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(5, 2), learning_rate=(STILL, 2 * STILL))
    fit = FitConfig(batch_size=11, plateau_patience=1, plateau_factor=0.25)
    task = small_task(images, phases=phases, fit=fit)
    _, _, notes = run(task, tmp_path / "whole")
    expected = [1, 1, 1 / 4, 1 / 16, 1 / 64, 2, 2]
    assert [line.learning_rate / STILL for line in notes.lines] == pytest.approx(expected, rel=1e-6)
    for epoch in (3, 5):
        restored = notes.checkpoints()[epoch - 1]
        _, outcome, _ = run(task, tmp_path / f"from-{epoch}", restored=restored)
        rates = [line.learning_rate / STILL for line in outcome.state.history]
        assert rates == pytest.approx(expected, rel=1e-6)


def test_tensorboard_reads_what_is_written(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(2, 1), learning_rate=(0.01, 0.02))
    folder = tmp_path / "tensorboard"
    files = LogFiles(history=str(tmp_path / "history.csv"), tensorboard=folder)
    notes = run(small_task(images, phases=phases, files=files), tmp_path / "run")[2]
    for part, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(folder / part))
        events.Reload()
        for metric in ("loss", "accuracy"):
            found = events.Tensors(f"epoch_{metric}")
            points = {event.step: float(tf.make_ndarray(event.tensor_proto)) for event in found}
            expected = {line.epoch - 1: getattr(line, f"{prefix}{metric}") for line in notes.lines}
            assert points == pytest.approx(expected, rel=1e-6)


def test_the_history_file_has_no_epoch_twice_after_a_restore(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    task = small_task(
        images, phases=PhasesConfig(epochs=(2, 1), trainable=("all", "all")), files=LogFiles(history=str(path))
    )
    first = run(task, tmp_path / "first")[2]
    assert path.read_bytes() == history_csv(first.lines)
    again = run(task, tmp_path / "again", restored=first.checkpoints()[0])[1]
    assert path.read_bytes() == history_csv(again.state.history)
    assert [line.epoch for line in again.state.history] == [1, 2, 3]


# --- losses that are no numbers --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_phase_epoch_and_step(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(1, 3), learning_rate=(STILL, 1e30))
    notes = Notes(tmp_path)
    trainer = Trainer(small_task(images, phases=phases), host=notes, world=World())
    with pytest.raises(
        TrainingDiverged,
        match=r"^The loss is (nan|inf) in phase 'fine-tune', epoch 1, step [23]\. .*learning_rate=1e\+30$",
    ):
        trainer.run()
    assert len(notes.saved) == 1
    assert all(np.isfinite(array).all() for array in notes.checkpoints()[0].weights)


def test_a_validation_loss_that_is_no_number_names_the_epoch(images: Images, tmp_path: Path) -> None:
    task = small_task(
        images, fit=FitConfig(batch_size=TRAIN), phases=PhasesConfig(epochs=(2,), learning_rate=(3e38,))
    )  # one step an epoch, and its loss is from before the step
    notes = Notes(tmp_path)
    with pytest.raises(TrainingDiverged, match=r"^The validation loss is (nan|inf) in phase 'train', epoch 1$"):
        Trainer(task, host=notes, world=World()).run()
    assert notes.saved == []


# --- stopping and going on -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed, with checkpoints within its epochs."""

    task: TrainTask
    outcome: Outcome
    notes: Notes
    weights: Arrays

    def check_same(self, outcome: Outcome, weights: Arrays) -> None:
        assert outcome.finished
        assert relative_difference(weights, self.weights) <= 1e-6
        assert relative_difference(outcome.best, self.outcome.best) <= 1e-6
        assert len(outcome.state.history) == len(self.outcome.state.history)
        for ours, theirs in zip(outcome.state.history, self.outcome.state.history, strict=True):
            (phase, numbers), (other, expected) = _phase_and_numbers(ours), _phase_and_numbers(theirs)
            assert phase == other
            assert numbers == pytest.approx(expected, rel=1e-6)


def _phase_and_numbers(epoch: Epoch) -> tuple[str, dict[str, float]]:
    return epoch.phase, epoch.metrics


def whole_run(task: TrainTask, folder: Path) -> Whole:
    trainer, outcome, notes = run(task, folder)
    return Whole(task=task, outcome=outcome, notes=notes, weights=trainer._weights())


@pytest.fixture(scope="module")
def whole(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """All that is random or remembered: dropout, augmentation, Adam, warm-up, a plateau, two phases, the best epoch."""
    task = small_task(
        images,
        model=ModelConfig(backbone="mlp", dropout=0.3),
        phases=PhasesConfig(epochs=(3, 2), learning_rate=(2e-3, 1e-3), trainable=("all", "dense2")),
        optimizer=OptimizerConfig(warmup_steps=70, clip_norm=1.0),
        fit=FitConfig(batch_size=2, seed=6, augmentation="digits", plateau_patience=1, early_stopping_patience=3),
        run=RunConfig(checkpoint_steps=20),
    )
    return whole_run(task, tmp_path_factory.mktemp("whole"))


def test_the_whole_run_has_something_to_lose(whole: Whole) -> None:
    states = [checkpoint.state for checkpoint in whole.notes.checkpoints()]
    assert {state.phase for state in states} == {0, 1, 2}
    within = [state for state in states if state.step]
    assert any(state.learning_rate for state in within)
    assert any(state.callbacks and state.callbacks["EarlyStopping"]["wait"] for state in within)
    assert any(state.best and state.best.epoch < state.epochs_done for state in states)


def test_no_two_checkpoints_are_of_one_step(whole: Whole) -> None:
    steps = [checkpoint.state.global_step for checkpoint in whole.notes.checkpoints()]
    assert steps == sorted(set(steps))  # they are named by it, and the later would replace the earlier


def test_every_checkpoint_holds_the_weights_of_the_best_epoch_so_far(whole: Whole) -> None:
    checkpoints = whole.notes.checkpoints()
    ends = {c.state.history[-1].epoch: c.weights for c in checkpoints if c.state.step == 0}
    assert len(ends) == 5
    for checkpoint in checkpoints:
        if checkpoint.state.best is not None:
            assert checkpoint.best is not None
            assert relative_difference(checkpoint.best, ends[checkpoint.state.best.epoch]) == 0


# Within the first epoch, at its end, within the second; at the first phase's end, within the second phase.
@pytest.mark.parametrize("step", [slow(1), slow(60), slow(61), slow(121), 180, slow(181), slow(241)])
def test_a_restored_run_reaches_the_same_weights(whole: Whole, tmp_path: Path, step: int) -> None:
    checkpoint = next(c for c in whole.notes.checkpoints() if c.state.global_step >= step)
    trainer, outcome, _ = run(whole.task, tmp_path, restored=checkpoint)
    whole.check_same(outcome, trainer._weights())


@pytest.mark.parametrize("stop_at", [slow(1), slow(30), 60, slow(100), slow(180), slow(200), slow(250)])
def test_a_stopped_run_goes_on_where_it_was(whole: Whole, tmp_path: Path, stop_at: int) -> None:
    _, stopped, notes = run(whole.task, tmp_path / "stopped", stop_at=stop_at)
    assert not stopped.finished
    assert stopped.state.global_step > stop_at
    trainer, outcome, _ = run(whole.task, tmp_path / "on", restored=notes.checkpoints()[-1])
    whole.check_same(outcome, trainer._weights())


def test_a_finished_run_is_left_as_it_is(whole: Whole, tmp_path: Path) -> None:
    _, outcome, notes = run(whole.task, tmp_path, restored=whole.notes.checkpoints()[-1])
    assert outcome.finished
    assert relative_difference(outcome.best, whole.outcome.best) == 0
    assert (notes.positions, notes.saved) == ([], [])


@pytest.mark.parametrize(
    "stop_at", [1, *(pytest.param(step, marks=pytest.mark.chaos) for step in (STEPS + 1, 2 * STEPS + 1))]
)
def test_a_run_with_all_methods_resumes_where_it_was(images: Images, tmp_path: Path, stop_at: int) -> None:
    task = small_task(
        images,
        model=ModelConfig(backbone="cnn", dropout=0.3),
        phases=PhasesConfig(epochs=(2, 1), trainable=("all", "all"), learning_rate=(2e-3,)),
        optimizer=OptimizerConfig(optimizer="adamw", weight_decay=0.1, ema_decay=0.9, layer_decay=0.7, accumulate=2),
        fit=FitConfig(
            batch_size=2,
            seed=5,
            augmentation="rand-augment",
            random_erasing=0.3,
            mixup=0.3,
            cutmix=1.0,
            sampling="balanced",
        ),
    )
    undisturbed = whole_run(task, tmp_path / "whole")
    _, _, notes = run(task, tmp_path / "stopped", stop_at=stop_at)
    stopped = notes.checkpoints()[-1]
    assert stopped.state.step > 0
    trainer, outcome, _ = run(task, tmp_path / "on", restored=stopped)
    undisturbed.check_same(outcome, trainer._weights())


def test_the_average_of_the_weights_is_validated_and_kept_and_training_goes_on_from_the_weights(
    images: Images, tmp_path: Path
) -> None:
    phases = PhasesConfig(epochs=(2,), learning_rate=(0.05,))
    plain = small_task(images, phases=phases, fit=FitConfig(batch_size=2, seed=5))
    averaged = replace(plain, job=replace(plain.job, optimizer=replace(PLAIN_SGD, ema_decay=0.98)))
    of_plain, _, _ = run(plain, tmp_path / "plain")
    trainer, outcome, notes = run(averaged, tmp_path / "averaged")

    assert relative_difference(trainer._weights(), of_plain._weights()) <= 1e-6
    assert relative_difference(outcome.best, trainer._weights()) > 1e-3
    best = outcome.state.best
    assert best is not None
    trainer.network.set_weights(outcome.best)
    metrics = trainer.evaluate(trainer.network)
    assert (metrics["loss"], metrics["accuracy"]) == pytest.approx((best.val_loss, best.val_accuracy), rel=1e-5)
    kept = notes.checkpoints()[-1].best
    assert kept is not None
    assert relative_difference(kept, outcome.best) == 0


def test_a_balanced_epoch_sees_each_class_equally_often(images: Images, tmp_path: Path) -> None:
    task = small_task(images, fit=FitConfig(batch_size=11, sampling="balanced", seed=5))
    trainer = Trainer(task, host=Notes(tmp_path), world=World())
    order = trainer._order(images)
    seen = images.labels[images.train][order].tolist()
    assert sorted(seen.count(label) for label in range(3)) == [40, 40, 41]


@pytest.mark.parametrize(("batch_size", "workers"), [(12, 2), (8, 3)])
def test_parts_of_unequal_size_are_refused(images: Images, tmp_path: Path, batch_size: int, workers: int) -> None:
    optimizer = OptimizerConfig(optimizer="sgd", accumulate=4)
    task = small_task(images, optimizer=optimizer, fit=FitConfig(batch_size=batch_size))
    with pytest.raises(
        ConfigError, match=rf"multiple of workers x accumulate \({workers * 4}\).*batch_size={batch_size}"
    ):
        Trainer(task, host=Notes(tmp_path), world=World(workers=workers))


@pytest.mark.slow
def test_a_run_with_momentum_and_a_cosine_goes_on_where_it_was(images: Images, tmp_path: Path) -> None:
    task = small_task(
        images,
        phases=PhasesConfig(epochs=(2, 1), trainable=("all", "all")),
        optimizer=OptimizerConfig(optimizer="sgd", momentum=0.9, schedule="cosine", warmup_steps=5),
        fit=FitConfig(batch_size=2, seed=5),
    )
    undisturbed = whole_run(task, tmp_path / "whole")
    _, _, notes = run(task, tmp_path / "stopped", stop_at=STEPS + 10)
    stopped = notes.checkpoints()[-1]
    assert STEPS < stopped.state.global_step < 2 * STEPS
    trainer, outcome, _ = run(task, tmp_path / "on", restored=stopped)
    undisturbed.check_same(outcome, trainer._weights())


def test_a_wish_to_stop_is_heeded_after_the_next_call(images: Images, tmp_path: Path) -> None:
    _, outcome, notes = run(small_task(images, fit=FitConfig(batch_size=2)), tmp_path, stop_at=1)
    assert not outcome.finished
    assert [position.step for position in notes.positions] == [1, 2]
    assert [checkpoint.state.global_step for checkpoint in notes.checkpoints()] == [2]


def test_a_wish_in_an_epochs_last_step_lets_it_end_first(images: Images, tmp_path: Path) -> None:
    task = small_task(images, fit=FitConfig(batch_size=TRAIN), phases=PhasesConfig(epochs=(2,)))
    _, outcome, notes = run(task, tmp_path, stop_at=1)
    assert outcome.finished
    assert len(notes.lines) == 2


def test_the_time_of_earlier_attempts_counts_once(images: Images, tmp_path: Path) -> None:
    earlier = small_task(images, phases=PhasesConfig(epochs=(2,)), began_at=time.time() - 1000)
    _, _, notes = run(earlier, tmp_path / "earlier")
    checkpoint = notes.checkpoints()[0]
    before_s = checkpoint.state.seconds
    assert 1000 <= before_s <= time.time() - earlier.began_at
    later = replace(earlier, began_at=time.time() - 300)
    _, outcome, _ = run(later, tmp_path / "later", restored=checkpoint)
    assert before_s + 300 <= outcome.state.seconds <= before_s + time.time() - later.began_at


def test_time_is_not_counted_twice_when_the_workers_of_an_attempt_are_restarted(images: Images, tmp_path: Path) -> None:
    task = small_task(images, phases=PhasesConfig(epochs=(2,)), began_at=time.time() - 1000)
    _, _, notes = run(task, tmp_path / "first")
    _, again, _ = run(task, tmp_path / "again", restored=notes.checkpoints()[0])
    assert 1000 <= again.state.seconds <= time.time() - task.began_at


def test_a_wish_to_stop_is_heeded_also_where_each_call_takes_a_whole_epoch(images: Images, tmp_path: Path) -> None:
    phases = PhasesConfig(epochs=(200,), learning_rate=(STILL,))
    task = small_task(images, phases=phases, fit=FitConfig(batch_size=TRAIN))
    _, outcome, notes = run(task, tmp_path, stop_at=3)
    assert not outcome.finished
    assert outcome.state.epochs_done == len(notes.lines) == len(notes.saved) <= 5


SETS = ((), (0,), (0, 2), (1, 2))


def task_of_sets(images: Images, **fields: Any) -> TrainTask:
    """Images with any number of classes, on which two of the methods for pixels mix labels."""
    labels = np.random.default_rng(4).integers(0, len(SETS), COUNT).astype(np.int32)
    return small_task(
        replace(images, labels=labels),
        label_sets=SETS,
        data=DataConfig(multi_label=True),
        phases=PhasesConfig(epochs=(3,), learning_rate=(0.5,)),
        **fields,
    )


def test_images_of_any_number_of_classes_are_validated_like_scikit_learn(images: Images, tmp_path: Path) -> None:
    task = task_of_sets(images, fit=FitConfig(batch_size=11, seed=5, best_metric="val_accuracy"))
    trainer, outcome, notes = run(task, tmp_path)
    truth = np.array([[k in SETS[label] for k in range(3)] for label in task.images.labels])
    validation = task.images.validation
    trainer.network.set_weights(outcome.best)
    logits = np.asarray(trainer.network(task.images.pixels[validation].astype(np.float32)))
    best = max(notes.lines, key=lambda epoch: epoch.score)
    assert best.score == best.val_mean_average_precision
    assert best.score == pytest.approx(average_precision_score(truth[validation], logits))
    assert best.val_accuracy == pytest.approx(((logits >= 0) == truth[validation]).all(axis=1).mean())
    found = trainer.evaluate(trainer.network)
    assert found["mean_average_precision"] == pytest.approx(best.score)
    probabilities = np.asarray(trainer.built.classifier.model(task.images.pixels[validation]))
    assert probabilities == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)


def test_sets_of_classes_are_learnt_by_heart(images: Images, tmp_path: Path) -> None:
    few = replace(images, train=images.train[:33])
    task = task_of_sets(few, fit=FitConfig(batch_size=11, seed=5))
    job = replace(task.job, phases=PhasesConfig(epochs=(120,), learning_rate=(0.5,)))
    _, outcome, _ = run(replace(task, job=job), tmp_path)
    assert outcome.state.history[-1].accuracy == 1.0


def test_mixed_sets_resume_where_they_were(images: Images, tmp_path: Path) -> None:
    fit = FitConfig(batch_size=11, seed=5, mixup=0.4, cutmix=1.0, augmentation="digits")
    optimizer = OptimizerConfig(optimizer="sgd", class_weights="balanced", label_smoothing=0.1, ema_decay=0.9)
    task = task_of_sets(images, fit=fit, optimizer=optimizer)
    _, whole, _ = run(task, tmp_path / "whole")
    _, stopped, notes = run(task, tmp_path / "stopped", stop_at=2)
    assert not stopped.finished
    _, resumed, _ = run(task, tmp_path / "resumed", restored=notes.checkpoints()[-1])
    assert resumed.state.history == whole.state.history
    assert relative_difference(resumed.best, whole.best) <= 1e-5
