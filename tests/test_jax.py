"""Training on Keras' JAX backend: the contracts of step, augmentation and loop, run once more there (on Ray:
test_train.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def on_jax(*arguments: str, devices: int) -> str:
    """Runs Python with Keras on JAX and so many devices; gives its output."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
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
        pytest.param(("test_loop.py",), 1, marks=pytest.mark.slow),
        pytest.param(("test_loop.py",), 2, marks=pytest.mark.slow),
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
