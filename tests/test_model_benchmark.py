"""benchmarks model, feed and gpu.sh: what they measure, and that they run where only JAX is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import feed, model
from benchmarks.model import ModelBenchmark
from benchmarks.peers.compute import flops_per_image, peak_flops
from mnist_dist import processor
from mnist_dist.console import Console
from mnist_dist.errors import ConfigError

ROOT = Path(__file__).parents[1]
ABSENT = ("ray", "tensorflow", "tyro", "msgspec", "boto3", "botocore", "obstore", "openvino", "torch")
BLOCK = f"""
import importlib.util, sys

found = importlib.util.find_spec

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, package=None: None if name in {ABSENT!r} else found(name, package)
"""


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has JAX and lacks what `gpu.sh` must not need."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "PYTHON": sys.executable}


def run(environment: dict[str, str], *command: str) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("work", ["infer", "train"])
def test_ours_is_measured_where_only_jax_is_installed(work: str, gpu_machine: dict[str, str]) -> None:
    asked = {"backbone": "cnn", "work": work, "system": "jax", "batch_size": 4, "size_px": 12, "seconds": 0.1}
    program = "import sys, runpy; sys.argv[:] = ['compute', sys.argv[1]]; import benchmarks.gpu; "
    program += "runpy.run_module('benchmarks.peers.compute', run_name='__main__')"
    found = run(gpu_machine, sys.executable, "-c", program, json.dumps({**asked, "precision": "float32"}))

    assert found["images_per_s"] > 0
    assert found["compile_s"] > 0
    assert found["memory_bytes"] > 2**20
    assert found["device"] == processor.described()
    assert found["flops_per_image"] == flops_per_image("cnn", 12) * (3 if work == "train" else 1)


@pytest.mark.chaos  # VGG16 and ResNet50 are compiled for both kinds of work
def test_gpu_sh_runs_to_its_end_where_only_jax_is_installed(gpu_machine: dict[str, str]) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image's photographs (pip install -e '.[bench]')")
    found = run(gpu_machine, str(ROOT / "benchmarks" / "gpu.sh"))

    rows = [(row["backbone"], row["work"], row["system"]) for row in found["networks"]["rows"]]
    assert rows == [(name, work, "jax") for name in ("vgg16", "resnet50") for work in ("infer", "train")]
    assert all("torch is not installed" in line for line in found["networks"]["skipped"])
    assert [row["backbone"] for row in found["feed"]["backbones"]] == ["vgg16", "resnet50"]
    assert all(row["images_per_s"] > 0 for row in found["feed"]["feed"])


def test_the_flops_of_vgg16_are_the_published_ones() -> None:
    """15.35 billion multiplications in its convolutions at 224 px, and our head."""
    assert flops_per_image("vgg16", 224) == pytest.approx(2 * (15_346_630_656 + 512 * 10))


def test_the_peak_of_a_gpu_is_known_by_its_name() -> None:
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("another", "bfloat16") is None
    assert peak_flops(processor.described(), "float32") is None


def test_what_is_not_installed_and_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None if name == "timm" else name)
    benchmark = ModelBenchmark(backbones=("no_such",), backend=("jax", "torch"), infer=True, seconds=0.1)
    result = model.measure(benchmark, console=Console(terminal=False))

    assert result["rows"] == []
    failed, absent = result["skipped"]
    assert failed.startswith("no_such, infer, Keras on JAX: ")
    assert "no_such" in failed.removeprefix("no_such")
    assert absent == "no_such, infer, PyTorch, compiled: timm is not installed"
    assert absent in model.table(result)


def test_a_table_compares_with_pytorch() -> None:
    common = {"backbone": "vgg16", "work": "train", "batch_size": 16, "memory_bytes": 2_000_000, "compile_s": 1.25}
    rows = [
        {**common, "system": "jax", "images_per_s": 150.0, "share_of_peak": 0.5},
        {**common, "system": "torch", "images_per_s": 100.0, "share_of_peak": None},
    ]
    shown = model.table({"rows": rows, "skipped": [], "machine": "m", "device": "d", "date": "2026-11-29"})

    assert "| vgg16, Keras on JAX | 16 | 150.0 | 1.50 | 50% | 2 | 1.2 |" in shown
    assert "| vgg16, PyTorch, compiled | 16 | 100.0 | 1.00 |  | 2 | 1.2 |" in shown


def test_both_kinds_of_work_at_once_are_neither_flag() -> None:
    assert ModelBenchmark().works == ("infer", "train")
    assert ModelBenchmark(train=True).works == ("train",)
    with pytest.raises(ConfigError, match="choose either train or infer"):
        ModelBenchmark(train=True, infer=True)


def test_a_device_is_busy_as_far_as_it_is_fed() -> None:
    fed = [{"cores": 1, "images_per_s": 100.0}, {"cores": 4, "images_per_s": 360.0}]
    slow, quick = feed.busy_of({"slow": 200.0, "quick": 720.0}, fed)

    assert slow == {"backbone": "slow", "images_per_s": 200.0, "cores_needed": pytest.approx(2.0), "busy": 1.0}
    assert quick["busy"] == pytest.approx(0.5)
    assert quick["cores_needed"] == pytest.approx(7.2)
