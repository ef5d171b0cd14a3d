"""benchmarks imported: which photographs count, the flags and the table; the figures themselves need torch and timm."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import encoded
from PIL import Image

from benchmarks import imported
from benchmarks.imported import COLUMNS, CONTROLS, MODELS, ImportedBenchmark
from mnist_dist.errors import ConfigError


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_photographs_that_the_libraries_misread_are_left_out(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a.jpg": encoded(photograph(120, 110), "JPEG"),
        "b/grey.png": encoded(photograph(130, 101).convert("L"), "PNG"),
        "c-turned.jpg": encoded(photograph(120, 120), "JPEG", exif=turned),
        "d-glass.png": encoded(photograph(120, 120).convert("RGBA"), "PNG"),
        "e-small.jpg": encoded(photograph(99, 400), "JPEG"),
        "f-cut.jpg": encoded(photograph(300, 300), "JPEG")[:-2000],
        "g.txt": b"no image",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)

    found = imported._photographs(ImportedBenchmark(images=str(tmp_path), count=2))

    assert found == [files["a.jpg"], files["b/grey.png"]]
    with pytest.raises(ConfigError, match=r"images has 3 photographs\. Received: images=2"):
        imported._photographs(ImportedBenchmark(images=str(tmp_path), count=3))


def test_photographs_without_a_folder_are_the_same_every_time_and_of_many_sizes() -> None:
    pytest.importorskip("skimage", reason="needs scikit-image (pip install -e '.[bench]'); runs where it is installed")

    first, second = (imported._photographs(ImportedBenchmark(count=4)) for _ in range(2))

    assert first == second
    assert len({Image.open(io.BytesIO(data)).size for data in first}) == 4


def test_flags_are_checked() -> None:
    assert len(ImportedBenchmark().models) == len(MODELS) == 12
    with pytest.raises(ConfigError, match=r"models are ResNet18, .*Received: models=\['AlexNet'\]"):
        ImportedBenchmark(models=("AlexNet",))
    with pytest.raises(ConfigError, match="trained models are timm:NAME=CHECKPOINT"):
        ImportedBenchmark(trained=("resnet18=w.pth",))


def test_the_table_has_a_row_per_model() -> None:
    figures: dict[str, Any] = {
        "source": "timm:x",
        "fitting": "224, stretch, bicubic",
        "median_top": 0.5,
        "classes": 9,
        "max_abs_difference": 1e-5,
        "float32_difference": 2e-5,
        "relative_difference": 3e-6,
        "agreement": 1.0,
        "fast_agreement": 0.875,
        "controls": dict.fromkeys(CONTROLS, 0.25),
    }

    lines = imported.table({"models": {"X": figures}}).splitlines()

    assert len(lines) == 3
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert lines[2].startswith(
        "| X | `timm:x` | 224, stretch, bicubic | 0.50, 9 | 1.0e-05 | 2.0e-05 | 3.0e-06 | 100.0% | 87"
    )
