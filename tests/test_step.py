"""step: the train step against NumPy, the evaluator against scikit-learn; one worker (several: test_train.py).

The contract of both backends: these tests run on TensorFlow, and once more on JAX (test_jax.py).
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, log_loss

from mnist_dist.config import Augmentation, FitConfig, ModelConfig, OptimizerConfig
from mnist_dist.data.batches import augmentation_draws, mixing_draws, mixing_partners, step_seeds
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import make_preset
from mnist_dist.models.classifier import build_classifier, set_trainable
from mnist_dist.models.mixing import mixed
from mnist_dist.training.backends import open_computation
from mnist_dist.training.feed import EvaluationBatch, Examples, StepImages, TrainChunk, World
from mnist_dist.training.step import (
    HITS,
    LOSS,
    STOP,
    Evaluator,
    StepConfig,
    Trained,
    make_optimizer,
    slowest_worker_s,
)

# S = steps, B = batch, H = height px, W = width px, C = channels, K = classes
S, B, H, W, C, K = 6, 7, 8, 9, 1, 3
SPEC = ImageSpec(height_px=H, width_px=W, channels=C)
EQUAL = np.ones(K, np.float32)
UNEQUAL = np.array([0.5, 1.0, 2.5], np.float32)
RATES = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.05], np.float32)
LOW_RATES = np.asarray(RATES / 100, np.float32)
Weights = list[npt.NDArray[Any]]


@pytest.fixture(scope="module")
def chunk() -> TrainChunk:
    random = np.random.default_rng(4)
    own = Examples(
        pixels=random.integers(0, 256, (S, B, H, W, C), dtype=np.uint8),
        labels=random.integers(0, K, (S, B), dtype=np.int32),
        draws=augmentation_draws(9, steps=range(S), batch_size=B, count=10),
    )
    return TrainChunk(images=StepImages(own=own), seeds=step_seeds(9, steps=range(S)))


def part(chunk: TrainChunk, steps: slice = slice(None), images: slice = slice(None)) -> TrainChunk:
    def cut(examples: Examples | tuple[()]) -> Any:
        return Examples(*(each[steps, images] for each in examples)) if examples else ()

    mixing = chunk.images.mixing[steps, images] if chunk.images.partners else ()
    cut_images = StepImages(own=cut(chunk.images.own), partners=cut(chunk.images.partners), mixing=mixing)
    return TrainChunk(images=cut_images, seeds=chunk.seeds[steps])


def content(chunk: TrainChunk, step: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Pixels and labels of a step."""
    return chunk.images.own.pixels[step], chunk.images.own.labels[step]


def mixed_chunk(chunk: TrainChunk, *, mixup: float = 0.0, cutmix: float = 0.0) -> TrainChunk:
    """Each image with another one of its batch."""
    chosen = mixing_partners(9, steps=range(S), batch_size=B)
    partners = Examples(*(np.stack([each[step][chosen[step]] for step in range(S)]) for each in chunk.images.own))
    mixing = mixing_draws(9, steps=range(S), batch_size=B, mixup=mixup, cutmix=cutmix)
    return replace(chunk, images=StepImages(own=chunk.images.own, partners=partners, mixing=mixing))


def softmax_regression() -> keras.Model:
    """The smallest network: logits = flatten(pixels) / 255 * kernel + bias."""
    keras.utils.set_random_seed(2)
    pixels = keras.Input((H, W, C))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(pixels))
    return keras.Model(pixels, keras.layers.Dense(K, bias_initializer="random_normal")(x))


def train_step(network: keras.Model, *, augmentation: Augmentation = "none", **options: Any) -> Callable[..., Any]:
    """A train step with SGD, with `optimizer` or with one that is `made`, that takes chunks as they are; other options
    are of `StepConfig`."""
    config = options.pop("optimizer", OptimizerConfig(optimizer="sgd", momentum=0.0))
    optimizer = options.pop("made", None) or make_optimizer(config, network.trainable_variables)
    trained = Trained(
        network=network,
        optimizer=optimizer,
        augmentation=make_preset(FitConfig(augmentation=augmentation)),
        config=StepConfig(**{"batch_size": B, "class_weights": EQUAL, **options}),
    )
    step = open_computation(World()).train_step(trained)
    return lambda chunk, **options: step(step.place(chunk, capacity=len(chunk) + 1), **options)


def evaluator_of(network: keras.Model) -> Evaluator:
    return open_computation(World()).evaluator(network)


class NumpyRegression:
    """Softmax regression in float64: the loss of the contract, its gradient, and clipping."""

    def __init__(
        self,
        network: keras.Model,
        *,
        smoothing: float = 0.0,
        class_weights: npt.NDArray[Any] = EQUAL,
        clip: float | None = None,
    ) -> None:
        self.weights: Weights = [weight.astype(np.float64) for weight in network.get_weights()]
        self.smoothing, self.class_weights, self.clip = smoothing, class_weights, clip

    def forward(
        self, pixels: npt.NDArray[Any], labels: npt.NDArray[Any]
    ) -> tuple[float, int, list[npt.NDArray[Any]], float]:
        """Loss, hits, gradients as they are applied, and their norm before clipping."""
        kernel, bias = self.weights
        x = pixels.reshape(len(pixels), -1) / 255
        logits = x @ kernel + bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        predicted = powers / powers.sum(axis=1, keepdims=True)
        targets = np.eye(K)[labels] * (1 - self.smoothing) + self.smoothing / K
        weights = self.class_weights[labels]
        loss = float(-(weights * (targets * np.log(predicted)).sum(axis=1)).sum() / len(pixels))
        by_logit = weights[:, None] * (predicted - targets) / len(pixels)
        gradients = [x.T @ by_logit, by_logit.sum(axis=0)]
        norm = float(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
        if self.clip is not None and norm > self.clip:
            gradients = [gradient * self.clip / norm for gradient in gradients]
        return loss, int((logits.argmax(axis=1) == labels).sum()), gradients, norm


def relative_difference(ours: Weights, theirs: Weights) -> float:
    """Over the tensors: norm(a - b) / norm(b)."""
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True))


# --- the train step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.15])
def test_sgd_steps_are_those_of_numpy(chunk: TrainChunk, clip: float | None) -> None:
    network, momentum = softmax_regression(), 0.8
    by_hand = NumpyRegression(network, smoothing=0.2, class_weights=UNEQUAL, clip=clip)
    optimizer = OptimizerConfig(optimizer="sgd", momentum=momentum)
    step = train_step(network, optimizer=optimizer, label_smoothing=0.2, class_weights=UNEQUAL, clip_norm=clip)
    reports = step(chunk, rates=RATES)

    velocity: Weights = [np.zeros_like(weight) for weight in by_hand.weights]
    norms = []
    for index in range(S):
        loss, hits, gradients, norm = by_hand.forward(*content(chunk, index))
        assert reports[index, LOSS] == pytest.approx(loss, rel=1e-5)
        assert reports[index, HITS] == hits
        velocity = [momentum * v - RATES[index] * g for v, g in zip(velocity, gradients, strict=True)]
        by_hand.weights = [weight + v for weight, v in zip(by_hand.weights, velocity, strict=True)]
        norms.append(norm)
    assert max(norms) > 0.15  # or nothing was clipped
    assert relative_difference(network.get_weights(), by_hand.weights) < 1e-5


def test_adamw_decays_the_kernel_and_not_the_bias(chunk: TrainChunk) -> None:
    network, decay = softmax_regression(), 0.5
    by_hand = NumpyRegression(network)
    step = train_step(network, optimizer=OptimizerConfig(optimizer="adamw", weight_decay=decay))
    step(chunk, rates=RATES)

    first: Weights = [np.zeros_like(weight) for weight in by_hand.weights]
    second: Weights = [np.zeros_like(weight) for weight in by_hand.weights]
    for index in range(S):
        gradients = by_hand.forward(*content(chunk, index))[2]
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
        second = [0.999 * v + 0.001 * g**2 for v, g in zip(second, gradients, strict=True)]
        kernel, bias = by_hand.weights
        decayed = [kernel * (1 - decay * RATES[index]), bias]
        scale = RATES[index] * np.sqrt(1 - 0.999 ** (index + 1)) / (1 - 0.9 ** (index + 1))
        by_hand.weights = [
            weight - scale * m / (np.sqrt(v) + 1e-7) for weight, m, v in zip(decayed, first, second, strict=True)
        ]
    assert relative_difference(network.get_weights(), by_hand.weights) < 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_layer_decay_gives_each_variable_a_rate_of_its_own(chunk: TrainChunk, decay: float) -> None:
    """As if each variable had an optimizer of its own; here the kernel, which decays, is two levels below the bias."""
    reached = []
    for scale, levels in ((1.0, ()), (0.25, ()), (1.0, (2, 0))):
        network = softmax_regression()
        config = OptimizerConfig(optimizer="adamw", weight_decay=decay, layer_decay=0.5)
        made = make_optimizer(config, network.trainable_variables, levels=levels)
        train_step(network, made=made)(part(chunk, slice(0, 1)), rates=RATES[:1] * np.float32(scale))
        reached.append(network.get_weights())
    full, quarter, layerwise = reached
    assert relative_difference(layerwise, [quarter[0], full[1]]) < 1e-6
    assert relative_difference(full, quarter) > 1e-2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_average_of_the_weights_is_that_of_numpy(chunk: TrainChunk, optimizer: Any) -> None:
    network, decay = softmax_regression(), 0.6
    made = make_optimizer(OptimizerConfig(optimizer=optimizer, ema_decay=decay), network.trainable_variables)
    step = train_step(network, made=made)
    average: Weights = []
    for index in range(S):
        step(part(chunk, slice(index, index + 1)), rates=LOW_RATES[index : index + 1])
        weights = network.get_weights()
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)] if average else weights
    made.finalize_variable_values(network.trainable_variables)
    assert relative_difference(network.get_weights(), average) < 1e-6
    assert relative_difference(weights, average) > 1e-4


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_the_loss_of_mixed_images_is_that_of_numpy(chunk: TrainChunk, mixup: float, cutmix: float) -> None:
    network = softmax_regression()
    by_hand = NumpyRegression(network)
    kernel, bias = by_hand.weights
    given = mixed_chunk(chunk, mixup=mixup, cutmix=cutmix)
    step = train_step(network, label_smoothing=0.2, class_weights=UNEQUAL)
    reports = step(part(given, slice(0, 1)), rates=RATES[:1])

    own, partners = given.images.own, given.images.partners
    assert isinstance(partners, Examples)
    first, second = (each.pixels[0].astype(np.float32) for each in (own, partners))
    images, shares = map(np.asarray, mixed(first, second, given.images.mixing[0]))
    predicted = log_softmax(images.reshape(B, -1) / 255 @ kernel + bias, axis=1)
    of_own, of_partners = own.labels[0], partners.labels[0]
    smoothed = np.eye(K) * 0.8 + 0.2 / K
    losses = [
        -(share * UNEQUAL[a] * (smoothed[a] * row).sum() + (1 - share) * UNEQUAL[b] * (smoothed[b] * row).sum())
        for share, a, b, row in zip(shares, of_own, of_partners, predicted, strict=True)
    ]
    assert reports[0, LOSS] == pytest.approx(sum(losses) / B, rel=1e-5)
    assert reports[0, HITS] == (predicted.argmax(axis=1) == np.where(shares >= 0.5, of_own, of_partners)).sum()


@pytest.mark.parametrize("augmentation", ["none", "digits"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_is_the_same_batch(chunk: TrainChunk, parts: int, augmentation: Augmentation) -> None:
    whole = part(mixed_chunk(chunk, mixup=0.4, cutmix=1.0), images=slice(0, 6))

    def reports_and_weights(**options: Any) -> tuple[npt.NDArray[Any], Weights]:
        network = small_cnn(dropout=0.0)
        step = train_step(network, augmentation=augmentation, clip_norm=0.5, batch_size=6, **options)
        return step(whole, rates=LOW_RATES), network.get_weights()

    (reports, weights), (of_parts, weights_of_parts) = reports_and_weights(), reports_and_weights(parts=parts)
    assert relative_difference([of_parts], [reports]) < 1e-5
    assert relative_difference(weights_of_parts, weights) < 1e-5


def test_the_parts_of_a_batch_have_dropout_of_their_own(chunk: TrainChunk) -> None:
    twice = part(chunk, images=slice(0, 6))
    same = Examples(*(np.concatenate([each[:, :3], each[:, :3]], axis=1) for each in twice.images.own))
    given = replace(twice, images=StepImages(own=same))

    def weights(**options: Any) -> Weights:
        network = small_cnn()
        train_step(network, batch_size=6, **options)(given, rates=LOW_RATES)
        return list(network.get_weights())

    alone = small_cnn()
    half = Examples(*(each[:, :3] for each in same))
    train_step(alone, batch_size=3)(replace(given, images=StepImages(own=half)), rates=LOW_RATES)
    assert relative_difference(weights(parts=2), alone.get_weights()) > 1e-4
    assert relative_difference(weights(parts=2), weights(parts=2)) < 1e-6


def small_cnn(trainable: str = "all", dropout: float = 0.4) -> keras.Model:
    classifier = build_classifier(ModelConfig(backbone="cnn", dropout=dropout), spec=SPEC, num_classes=K, seed=3)
    set_trainable(classifier, trainable)
    return classifier.network


def test_steps_in_one_call_are_the_same_steps_one_by_one(chunk: TrainChunk) -> None:
    results = []
    for edges in ([0, S], [0, 1, 2, 5, S]):
        network = small_cnn()
        step = train_step(network, augmentation="digits", optimizer=OptimizerConfig(), clip_norm=1.0)
        slices = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        reports = [step(part(chunk, steps), rates=LOW_RATES[steps]) for steps in slices]
        results.append((np.concatenate(reports), network.get_weights()))
    (whole, weights), (pieces, weights_of_pieces) = results
    assert whole.shape == (S, 3)
    assert relative_difference([pieces], [whole]) <= 1e-6
    assert relative_difference(weights_of_pieces, weights) <= 1e-6


def test_the_updates_of_the_slices_add_up_to_that_of_the_batch(chunk: TrainChunk) -> None:
    def update(images: slice) -> tuple[float, Weights]:
        network = softmax_regression()
        before = network.get_weights()
        report = train_step(network)(part(chunk, slice(0, 1), images), rates=RATES[:1])
        return float(report[0, LOSS]), [b - a for a, b in zip(before, network.get_weights(), strict=True)]

    loss, whole = update(slice(0, B))
    parts = [update(images) for images in (slice(0, 2), slice(2, B))]
    assert sum(part_loss for part_loss, _ in parts) == pytest.approx(loss, rel=1e-5)
    total = [np.add(*changes) for changes in zip(*(weights for _, weights in parts), strict=True)]
    assert relative_difference(total, whole) < 1e-4


def other_draws(chunk: TrainChunk) -> TrainChunk:
    own = chunk.images.own
    return replace(chunk, images=StepImages(own=own._replace(draws=own.draws[::-1])))


def test_dropout_is_a_function_of_the_seeds_and_augmentation_of_the_draws(chunk: TrainChunk) -> None:
    def weights_after(other: TrainChunk) -> Weights:
        network = small_cnn()
        train_step(network, augmentation="digits")(other, rates=LOW_RATES)
        return list(network.get_weights())

    expected = weights_after(chunk)
    assert relative_difference(weights_after(part(chunk)), expected) <= 1e-6
    assert relative_difference(weights_after(replace(chunk, seeds=step_seeds(8, steps=range(S)))), expected) > 1e-4
    assert relative_difference(weights_after(other_draws(chunk)), expected) > 1e-4


def test_what_is_frozen_is_left_alone(chunk: TrainChunk) -> None:
    network = small_cnn("head")
    before = network.get_weights()
    train_step(network)(chunk, rates=RATES)
    changed = [not np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True)]
    assert changed == [False] * (len(before) - 2) + [True, True]


def test_the_wish_to_stop_is_reported_in_every_step(chunk: TrainChunk) -> None:
    step = train_step(softmax_regression())
    assert step(chunk, rates=RATES)[:, STOP].tolist() == [0.0] * S
    assert step(part(chunk, slice(0, 2)), rates=RATES[:2], stop=True)[:, STOP].tolist() == [1.0, 1.0]
    assert step(chunk, rates=RATES, stop=False)[:, STOP].tolist() == [0.0] * S


def test_a_loss_that_is_no_number_is_reported(chunk: TrainChunk) -> None:
    reports = train_step(softmax_regression())(chunk, rates=np.full(S, np.inf, np.float32))
    assert np.isfinite(reports[0, LOSS])
    assert not np.isfinite(reports[1:, LOSS]).any()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", keras.optimizers.SGD), ("adam", keras.optimizers.Adam), ("adamw", keras.optimizers.AdamW)],
)
def test_an_optimizer_is_built_for_its_variables(name: str, kind: Callable[..., Any]) -> None:
    network = softmax_regression()
    optimizer = make_optimizer(OptimizerConfig(optimizer=name), network.trainable_variables)  # type: ignore[arg-type]
    assert type(optimizer) is kind
    shapes = [tuple(variable.shape) for variable in optimizer.variables if len(variable.shape)]
    kernel_and_bias = [(H * W * C, K), (K,)]
    assert sorted(shapes) == sorted(kernel_and_bias * (1 if name == "sgd" else 2))


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_batch(count: int, *, padding: int = 0) -> EvaluationBatch:
    random = np.random.default_rng(8)
    return EvaluationBatch(
        pixels=random.integers(0, 256, (count, H, W, C), dtype=np.uint8),
        labels=random.integers(0, K, count, dtype=np.int32),
        weights=(np.arange(count) < count - padding).astype(np.float32),
    )


def test_evaluated_sums_are_those_of_scikit_learn() -> None:
    network, batch = small_cnn(), evaluation_batch(23)
    loss, hits, images = evaluator_of(network)(batch)
    predicted = np.asarray(keras.ops.softmax(network(batch.pixels.astype(np.float32), training=False)))
    predicted = predicted.astype(np.float64) / predicted.sum(axis=1, keepdims=True, dtype=np.float64)
    assert images == 23
    assert loss / images == pytest.approx(log_loss(batch.labels, predicted, labels=range(K)), rel=1e-5)
    assert hits / images == accuracy_score(batch.labels, predicted.argmax(axis=1))
    assert 0 < hits < images  # or accuracy would prove little


def test_padding_does_not_count() -> None:
    evaluator = evaluator_of(small_cnn())
    padded = evaluation_batch(11, padding=4)
    real = EvaluationBatch(pixels=padded.pixels[:7], labels=padded.labels[:7], weights=padded.weights[:7])
    assert evaluator(padded) == pytest.approx(evaluator(real), rel=1e-6)
    assert evaluator(padded)[2] == 7


def test_evaluation_changes_nothing_and_drops_nothing() -> None:
    network, batch = small_cnn(), evaluation_batch(5)
    before, evaluator = network.get_weights(), evaluator_of(network)
    sums = evaluator(batch)
    assert sums.dtype == np.float64
    assert evaluator(batch).tolist() == sums.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True))


# --- sums over the workers -------------------------------------------------------------------------------------------


def test_the_sum_over_one_worker_is_its_own() -> None:
    values = np.array([0.1, 1e-17, 3e300])
    assert open_computation(World()).sum_over_workers(values).tolist() == values.tolist()
    assert slowest_worker_s(open_computation(World()), 0.75, world=World()) == 0.75
