"""The commands as a person types them: exit codes, the JSON line, quietness, the README's words."""

from pathlib import Path

import boto3
import numpy as np
import pytest
from harness import ROOT, run_command

from mnist_dist.recipes import TRAINING_RECIPES


def write_idx(folder: Path, *, train: int, test: int) -> Path:
    """Idx files in MNIST's format, with noise for digits."""
    random = np.random.default_rng(3)
    folder.mkdir()
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x0803, count, 28, 28], ">u4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([0x0801, count], ">u4").tobytes() + labels.tobytes()
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [  # what the others differ in is tested in test_recipes, too; test_end_to_end runs one on arrays
        name if name == "folder-mobilenet-v2" else pytest.param(name, marks=pytest.mark.chaos)
        for name in TRAINING_RECIPES
    ],
)
def test_each_recipe_fits_together(recipe: str, tmp_path: Path, folder_of_images: Path) -> None:
    flags = ["--dry-run", "--storage", str(tmp_path / "storage"), "--epochs", "1"]
    if recipe.startswith("mnist"):
        flags += ["--data-dir", str(write_idx(tmp_path / "idx", train=700, test=90))]
    elif recipe.startswith("folder"):
        flags += ["--data", str(folder_of_images), "--batch-size", "6", "--weights", "none"]
    code, result, err = run_command("jobs.train", recipe, *flags)
    assert code == 0, err
    assert result["recipe"] == recipe
    assert result["bundle"] is None
    assert result["dry_run"]
    assert 0 <= result["test_accuracy"] <= 1


@pytest.mark.slow
def test_train_reads_and_writes_s3(s3: str, s3_server: str, folder_of_images: Path) -> None:
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=s3_server)
    for file in folder_of_images.rglob("*.png"):
        client.upload_file(str(file), bucket, f"{prefix}/images/{file.relative_to(folder_of_images)}")
    command = ["jobs.train", "quickstart", "--data", f"{s3}/images", "--storage", f"{s3}/runs", "--name", "run"]
    code, result, err = run_command(*command, "--batch-size", "8", "--epochs", "2")
    assert code == 0, err
    assert result["bundle"] == f"{s3}/runs/run/bundle"
    assert result["train_images"] + result["validation_images"] + result["test_images"] == 40
    assert run_command(*command, "--batch-size", "8", "--epochs", "2")[1] == result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("no-such-recipe",), "The recipes are quickstart, mnist-mlp"),
        pytest.param(("--backbone", "vgg17"), "Did you mean vgg16", marks=pytest.mark.slow),
        (("--data", "no_such_data"), "no data set of this name"),
        pytest.param(("--trainable", "block9"), "trainable for cnn must be one of head, all", marks=pytest.mark.slow),
        pytest.param(
            ("--backbone", "vgg16", "--image-size-px", "9"),
            "vgg16 needs images of at least 32 px",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--storage", "ftp://bucket"), "s3://bucket/prefix", marks=pytest.mark.slow),
        pytest.param(("--weights", "imagenet"), "weights for cnn must be none", marks=pytest.mark.slow),
    ],
)
def test_wrong_usage_is_told_before_any_work(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    recipe = () if flags[0] == "no-such-recipe" else ("quickstart",)
    storage = () if "--storage" in flags else ("--storage", str(tmp_path))
    code, result, err = run_command("jobs.train", *recipe, *flags, *storage)
    assert code == 2
    assert message in result["error"]
    assert f"error: {result['error']}" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flag", "value"), [("--batch-size", "0"), ("--learning-rate", "-1"), ("--workers", "0")])
def test_a_value_out_of_range_is_told_with_its_flag(flag: str, value: str) -> None:
    code, _, err = run_command("jobs.train", "quickstart", flag, value)
    assert code == 2
    assert f"Received: {flag} " in err


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e . && python -m jobs.quickstart" in readme
    assert "pip install -e '.[dev]' && pytest" in readme
    assert "pip install -e '.[dev]' && pytest" in (ROOT / ".ci" / "run").read_text()
