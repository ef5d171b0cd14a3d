"""Training on Keras' JAX backend: the contracts of step, augmentation and loop, run once more there (on Ray:
test_train.py)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist_dist.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[1]
PADDED_BATCH_NORM = """
import numpy as np
from mnist_dist.config import ModelConfig, OptimizerConfig
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.classifier import build_classifier, set_trainable
from mnist_dist.training.backends import open_computation
from mnist_dist.training.feed import World
from mnist_dist.training.step import StepConfig, Trained, make_optimizer

spec = ImageSpec(height_px=8, width_px=9, channels=1)
classifier = build_classifier(ModelConfig(backbone="cnn_bn"), spec=spec, num_classes=3)

def begin(batch_size):
    network = classifier.network
    optimizer = make_optimizer(OptimizerConfig(), network.trainable_variables)
    config = StepConfig(batch_size=batch_size, class_weights=np.ones(3, np.float32))
    open_computation(World()).train_step(Trained(network=network, optimizer=optimizer, config=config))

begin(6)
try:
    begin(7)
except ConfigError as error:
    print(error)
set_trainable(classifier, "head")
begin(7)
"""


LOOPS = """
import sys
import numpy as np
from mnist_dist.config import FitConfig, ModelConfig, OptimizerConfig
from mnist_dist.data.batches import augmentation_draws, step_seeds
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import make_preset
from mnist_dist.models.classifier import build_classifier
from mnist_dist.training.feed import Examples, StepImages, TrainChunk, World
from mnist_dist.training.jax_step import JaxComputation, JaxTrainStep
from mnist_dist.training.step import StepConfig, Trained, make_optimizer

S, B, K = 5, 7, 3
spec, random = ImageSpec(height_px=8, width_px=9, channels=1), np.random.default_rng(4)
preset = make_preset(FitConfig(augmentation="digits"))
own = Examples(
    pixels=random.integers(0, 256, (S, B, *spec.shape), dtype=np.uint8),
    labels=random.integers(0, K, (S, B), dtype=np.int32),
    draws=augmentation_draws(9, steps=range(S), batch_size=B, count=preset.draws),
)
chunk = TrainChunk(images=StepImages(own=own), seeds=step_seeds(9, steps=range(S)))

def reports_and_weights(loops, parts=1):
    network = build_classifier(ModelConfig(backbone="cnn", dropout=0.4), spec=spec, num_classes=K).network
    optimizer = make_optimizer(OptimizerConfig(), network.trainable_variables)
    config = StepConfig(batch_size=B, class_weights=np.ones(K, np.float32), clip_norm=0.5, parts=parts)
    trained = Trained(network=network, optimizer=optimizer, config=config, augmentation=preset)
    devices = JaxComputation(World())._all
    step = JaxTrainStep(trained, world=World(), devices=devices, own_devices=devices.count, loops=loops)
    reports = [step(step.place(chunk, capacity=8), rates=np.full(S, 1e-3, np.float32), stop=True) for _ in range(2)]
    return np.concatenate(reports), network.get_weights()

for parts in (1, 2):
    looped, single = (reports_and_weights(loops, parts) for loops in (True, False))
    np.testing.assert_allclose(looped[0], single[0], rtol=1e-4)
    for ours, theirs in zip(looped[1], single[1]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
"""
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from mnist_dist.config import FitConfig, ModelConfig, OptimizerConfig, PhasesConfig, TrainJob
from mnist_dist.images.spec import ImageSpec
from mnist_dist.sources.source import open_source
from mnist_dist.training.checkpoints import read_checkpoint, write_checkpoint
from mnist_dist.training.feed import Images, World
from mnist_dist.training.loop import Trainer
from mnist_dist.training.phase import TrainTask

begun, ended, stop_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
job = TrainJob(
    model=ModelConfig(backbone="cnn", dropout=0.0),
    phases=PhasesConfig(epochs=(3,), learning_rate=(0.01,)),
    optimizer=OptimizerConfig(optimizer="sgd", schedule="cosine", warmup_steps=7),
    fit=FitConfig(batch_size=50, precision="float32", augmentation="digits", seed=2),
)
source = open_source(job.data)
images = Images(
    pixels=source.pixels,
    labels=source.table["label"].to_numpy().astype(np.int32),
    train=np.arange(1_280), validation=np.arange(1_280, 1_440), test=np.arange(0),
)
task = TrainTask(
    job=job, spec=ImageSpec(height_px=8, width_px=8, channels=1), class_names=source.class_names, images=images
)

class Keeper:
    def progress(self, position):
        return (position.epoch - 1) * position.steps + position.step >= stop_at
    def epoch_ended(self, epoch):
        pass
    def save(self, checkpoint):
        self.last = checkpoint

keeper = Keeper()
trainer = Trainer(task, host=keeper, world=World())
if begun:
    trainer.restore(read_checkpoint(Path(begun)))
trainer.run()
ended.mkdir()
write_checkpoint(ended, keeper.last)
"""


def on_jax(*arguments: str, devices: int = 1, backend: str = "jax") -> str:
    """Runs Python with Keras on JAX and so many devices; gives its output."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-2_000:]
    return done.stdout


@pytest.mark.parametrize(
    ("files", "devices"),
    [
        (("test_step.py", "test_augmentation.py"), 1),
        pytest.param(("test_step.py",), 3, marks=pytest.mark.slow),
        pytest.param(("test_loop.py",), 1, marks=pytest.mark.chaos),
        pytest.param(("test_loop.py",), 2, marks=pytest.mark.chaos),
    ],
)
def test_the_contracts_hold_on_jax(files: tuple[str, ...], devices: int) -> None:
    shown = on_jax("-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{file}" for file in files), devices=devices)
    assert " passed" in shown
    assert "skipped" not in shown


def test_a_batch_that_batch_norm_would_see_padded_is_refused() -> None:
    shown = on_jax("-c", PADDED_BATCH_NORM, devices=2)
    assert shown == (
        "batch_size must be a multiple of 2, the number of devices, for a network with BatchNorm on JAX. Received: "
        "batch_size=7\n"
    )


def test_steps_in_one_program_are_the_same_steps_one_by_one() -> None:
    """On accelerators a call is one program, on CPUs one per step."""
    on_jax("-c", LOOPS)
    on_jax("-c", LOOPS, devices=2)


@pytest.mark.slow  # three trainings of seconds, each in its process
@pytest.mark.parametrize("first", ["tensorflow", pytest.param("jax", marks=pytest.mark.chaos)])
def test_both_backends_continue_a_checkpoint_to_the_same_weights(tmp_path: Path, first: str) -> None:
    """50 steps with momentum, a schedule and augmentation. Keras draws initial weights by the backend, so both begin
    with the checkpoint of one of them."""
    on_jax("-c", RUN, "", str(tmp_path / "begun"), "25", backend=first)
    begun = read_checkpoint(tmp_path / "begun")
    assert 25 <= begun.state.global_step < 50
    for backend in ("tensorflow", "jax"):
        on_jax("-c", RUN, str(tmp_path / "begun"), str(tmp_path / backend), "1000", backend=backend)
    theirs, ours = (read_checkpoint(tmp_path / backend) for backend in ("tensorflow", "jax"))
    assert ours.state.global_step == theirs.state.global_step == 75
    for name in ("weights", "optimizer"):
        pairs = list(zip(getattr(ours, name), getattr(theirs, name), strict=True))
        assert all(a.shape == b.shape for a, b in pairs)
        apart = [float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12) for a, b in pairs]
        assert max(apart) <= 1e-4, name
    moved = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours.weights, begun.weights, strict=True)]
    assert max(moved) > 0.01  # or there was nothing to compare
