"""The mistakes of somebody who types a command for the first time: each ends at once and says what to do.

Every case runs the real command in a process of its own, without Ray: what is wrong is found before it starts.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import run_command
from PIL import Image
from scored import one_hot, scored_rows, write_scored

URIS = ["/elsewhere/cat/1.jpg", "/elsewhere/cat/2.jpg", "/elsewhere/dog/3.jpg"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs of two classes, loose photographs, a prediction table, and files of labels."""
    root = tmp_path_factory.mktemp("newcomer")
    for path in ("photos/cat/1.jpg", "photos/cat/2.jpg", "photos/dog/3.jpg", "loose/1.jpg", "loose/2.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(root / path)
    write_scored(root / "table", scored_rows(URIS, one_hot([0, 0, 1], 2), ("cat", "dog")))
    (root / "names.csv").write_text("uri,label\n1.jpg,cat\n2.jpg,cat\n3.jpg,dog\n")
    (root / "columns.csv").write_text("filename,target\n1.jpg,cat\n")
    (root / "classes.csv").write_text("uri,label\n/elsewhere/cat/1.jpg,cta\n")
    (root / "model.keras").touch()
    return root


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address at which nobody listens, and nobody will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


MISTAKES = [
    ("train --batch-sise 8", "ConfigError", "did you mean --batch-size?"),
    ("train mnist-cn", "ConfigError", "did you mean mnist-cnn?"),
    ("trian", "ConfigError", "did you mean train?"),
    ("train --data {here}/photso", "DataError", "did you mean {here}/photos?"),
    ("train --data {here}/photos --backbone vgg61", "ConfigError", "Did you mean vgg16?"),
    ("train --data {here}/loose --backbone cnn", "DataError", "one subfolder per class (FOLDER/CLASS/IMAGE)"),
    ("train mnist-cnn-bn --data {here}/photos", "ConfigError", "there is `train folder-mobilenet-v2`"),
    ("search search-digits --data {here}/photos", "ConfigError", "there is `search search-backbones`"),
    ("train folder-vgg16", "ConfigError", "needs --data: a folder with one subfolder per class"),
    ("train --data {here}/photos --weights {here}/best.h5", "WeightsError", "{here} holds "),
    ("train --data s3:/bucket/photos", "StorageError", "did you mean s3://bucket/photos?"),
    ("train --epochs 1 2 --trainable head block4 all", "ConfigError", "--epochs, --learning-rate and --trainable must"),
    ("train --phases haed", "ConfigError", "the only phase is train. Received: --phases haed"),
    ("score --bundle {here}/model.keras --input {here}/photos --output {here}/o", "BundleError", "mnist-dist import"),
    ("score --bundle b --input {here}/photos --output {here}/photos/o", "ConfigError", "{here}/photos-predictions"),
    ("score --bundle b --input s3://bucket/x --output s3://bucket/y", "StorageError", "AWS_ACCESS_KEY_ID"),
    ("evaluate --predictions {here}/tabel", "DataError", "did you mean {here}/table?"),
    ("evaluate --predictions {here}/table --labels {here}/columns.csv", "DataError", "--uri-column filename"),
    ("search --space {here}/names.csv", "ConfigError", "TOML"),
]


@pytest.mark.parametrize(("command", "error_type", "remedy"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_ends_with_2_and_says_what_to_do(
    command: str, error_type: str, remedy: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # Other tests have a server, and credentials for it.
    arguments = [word.format(here=here) for word in command.split()]
    without = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "", "AWS_SHARED_CREDENTIALS_FILE": ""}
    code, result, err = run_command("mnist_dist", *arguments, **without)
    assert (code, result["error_type"]) == (2, error_type)
    assert remedy.format(here=here) in result["error"]
    assert f"error: {result['error']}\n" in err
    assert "Traceback" not in err


def test_labels_by_file_name_end_with_1_and_the_flag_that_matches_them(here: Path) -> None:
    table, labels = str(here / "table"), str(here / "names.csv")
    code, result, _ = run_command("mnist_dist", "evaluate", "--predictions", table, "--labels", labels)
    assert (code, result["error_type"]) == (1, "LabelsUnmatched")
    assert "--match name" in result["error"]
    assert URIS[0] in result["error"]
    code, result, _ = run_command(
        "mnist_dist", "evaluate", "--predictions", table, "--labels", labels, "--match", "name"
    )
    assert (code, result["accuracy"]) == (0, 1.0)


def test_labels_of_no_class_end_with_1_and_the_class_that_was_meant(here: Path) -> None:
    table, labels = str(here / "table"), str(here / "classes.csv")
    code, result, _ = run_command("mnist_dist", "evaluate", "--predictions", table, "--labels", labels)
    assert (code, result["error_type"]) == (1, "LabelsUnmatched")
    assert "'cta' (did you mean cat?)" in result["error"]


def test_a_dead_address_of_ray_ends_with_2_and_names_the_variable(dead_address: str, tmp_path: Path) -> None:
    code, result, _ = run_command("mnist_dist", "train", "--storage", str(tmp_path), RAY_ADDRESS=dead_address)
    assert (code, result["error_type"]) == (2, "ConfigError")
    assert f"RAY_ADDRESS='{dead_address}'" in result["error"]
    assert "unset RAY_ADDRESS" in result["error"]
    assert list(tmp_path.iterdir()) == []
