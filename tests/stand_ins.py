"""Small files of the names that the pages use: what their commands are run on.

Owns: the names and what lies behind them. Does not own: which commands there are (`doc_commands.py`), or running them
(`test_docs_commands.py`).
"""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import foreign_models
import numpy as np
import numpy.typing as npt
import onnx
import onnx_models
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from corpus import encoded, tar_of
from doc_commands import ROOT
from harness import SPEC, s3_client, write_spread_bundle
from PIL import Image
from scored import one_hot, scored_rows, write_scored
from sklearn.datasets import load_digits

CLASSES = ("cat", "dog")
PHOTOS_PER_CLASS = 160
SIZE = (32, 28)
"""Width and height, px: small images train a small network."""


def make(folder: Path) -> None:
    """Makes what several pages name, in an empty folder."""
    make_photos(folder / "photos")
    shutil.copytree(folder / "photos", folder / "FOLDER")
    shutil.copytree(folder / "photos" / "cat", folder / "archive")
    members = {f"{name}.jpg": photo(seed) for seed, name in enumerate("abc")}
    (folder / "archive.tar").write_bytes(tar_of(members))
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").write_bytes(tar_of(members))
    (folder / "cat.jpg").write_bytes(photo(5))
    make_digits(folder)
    make_labels(folder)
    make_models(folder)
    write_scored(folder / "runs" / "nightly", scored_rows(["a.jpg"], one_hot([0], len(CLASSES)), CLASSES))
    small_space = (ROOT / "docs" / "search.md").read_text().split("```toml\n")[2].split("```")[0]
    (folder / "space.toml").write_text(small_space)


def photo(seed: int, *, brightness: int = 0) -> bytes:
    """A JPEG of noise; dogs are brighter than cats."""
    width, height = SIZE
    pixels = np.random.default_rng(seed).integers(brightness, brightness + 128, (height, width, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def make_photos(folder: Path) -> None:
    """A folder per class."""
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(PHOTOS_PER_CLASS):
            seed = 1000 * number + index
            (folder / name / f"{seed}.jpg").write_bytes(photo(seed, brightness=127 * number))


def make_digits(folder: Path) -> None:
    """MNIST's four files, of 300 and 60 digits, and one of them as a PNG."""
    digits = load_digits()
    pixels = np.pad(np.kron(digits.images[:360], np.ones((3, 3))) * 15.9, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    Image.fromarray(pixels[7]).save(folder / "seven.png")
    idx = folder / "FOLDER_OF_IDX_FILES"
    idx.mkdir()
    labels: npt.NDArray[Any] = digits.target[:360].astype(np.uint8)
    for stem, part in (("train", slice(0, 300)), ("t10k", slice(300, 360))):
        head = struct.pack(">4I", 2051, *pixels[part].shape)
        (idx / f"{stem}-images-idx3-ubyte").write_bytes(head + pixels[part].tobytes())
        names = labels[part]
        (idx / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, len(names)) + names.tobytes())


def make_labels(folder: Path) -> None:
    """The labels of the photographs, as files of several forms."""
    paths = sorted(path.relative_to(folder) for path in (folder / "photos").rglob("*.jpg"))
    names = [path.parent.name for path in paths]
    pyarrow.csv.write_csv(pa.table({"uri": list(map(str, paths)), "label": names}), folder / "truth.csv")
    sets = pa.array([[name] for name in names], pa.list_(pa.string()))
    pq.write_table(pa.table({"uri": list(map(str, paths)), "label": sets}), folder / "truth.parquet")
    stems = pa.table({"image_id": [path.stem for path in paths], "target": names})
    pyarrow.csv.write_csv(stems, folder / "kaggle.csv")
    several = pa.table(
        {
            "uri": list(map(str, paths)),
            "label": [";".join(each) for each in _several(names)],
            **{name: [int(name in each) for each in _several(names)] for name in (*CLASSES, "bird")},
        }
    )
    pyarrow.csv.write_csv(several, folder / "list.csv")
    images = pa.array([(folder / path).read_bytes() for path in paths], pa.binary())
    pq.write_table(pa.table({"image": images, "label": sets}), folder / "validation.parquet")


def _several(names: Sequence[str]) -> list[list[str]]:
    """Every third image also has a bird."""
    return [[name, "bird"] if number % 3 == 0 else [name] for number, name in enumerate(names)]


def make_models(folder: Path) -> None:
    """Models as people have them, and bundles: `DIR` by Keras, `BUNDLE` with several classes an image."""
    foreign_models.foreign_onnx(folder / "resnet18.onnx", classes=len(CLASSES), side=224)
    save_keras_model(folder / "model.keras")
    (folder / "names.txt").write_text("\n".join(CLASSES))
    save_backbone(folder / "dinov2" / "onnx" / "model.onnx")
    (folder / "dinov2" / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    steps = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "resample": 3}
    steps |= {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "dinov2" / "preprocessor_config.json").write_text(json.dumps(steps))
    size = (SPEC.width_px, SPEC.height_px)
    images = [Image.open(path).convert("RGB").resize(size) for path in sorted((folder / "photos").rglob("*5.jpg"))]
    write_spread_bundle(folder / "DIR", images=images, seed=3)
    onnx_models.small_bundle(folder / "BUNDLE", names=CLASSES, activation="Sigmoid")


def save_backbone(file: Path) -> None:
    """A network with the output that Hugging Face's backbones have, `pooler_output`."""
    graph = onnx.load(foreign_models.foreign_onnx(file, hidden=True))
    for names in [*(node.input for node in graph.graph.node), *(node.output for node in graph.graph.node)]:
        names[:] = ["pooler_output" if name == "pooled" else name for name in names]
    graph.graph.output[1].name = "pooler_output"
    onnx.save(graph, file)


def save_keras_model(file: Path) -> None:
    """A classifier with its normalisation inside."""
    import keras

    layers = keras.layers
    network = [layers.Rescaling(1 / 255), layers.Conv2D(4, 5, strides=8), layers.GlobalAveragePooling2D()]
    keras.Sequential([keras.Input((224, 224, 3)), *network, layers.Dense(len(CLASSES), "softmax")]).save(file)


# --- what only some pages have ---------------------------------------------------------------------------------------


def _tables(folder: Path) -> None:
    """Two finished tables of the photographs."""
    uris = sorted(map(str, (folder / "photos").rglob("*.jpg")))
    codes = [CLASSES.index(Path(uri).parent.name) for uri in uris]
    write_scored(folder / "predictions", scored_rows(uris, one_hot(codes, len(CLASSES)), CLASSES))
    codes[:9] = [1] * 9
    write_scored(folder / "other-predictions", scored_rows(uris, one_hot(codes, len(CLASSES)), CLASSES))


def _scans(folder: Path) -> None:
    """Digits, and their labels."""
    digits, names = load_digits(), [f"scans/{number:02d}.png" for number in range(20)]
    (folder / "scans").mkdir()
    for name, pixels in zip(names, digits.images[:20], strict=True):
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / name)
    labels = pa.table({"uri": names, "label": [str(label) for label in digits.target[:20]]})
    pyarrow.csv.write_csv(labels, folder / "digits.csv")


def _bundles_of_runs(folder: Path) -> None:
    """The bundles of runs that another page describes, and an imported one."""
    for name in ("quickstart", "mine"):
        shutil.copytree(folder / "DIR", folder / "runs" / name / "bundle")
    shutil.copytree(folder / "BUNDLE", folder / "imported")


def _bundle_of_timm(folder: Path) -> None:
    """What the import of a timm model gives, for which torch is missing."""
    shutil.copytree(folder / "DIR", folder / "timm-bundle")


OF_PAGE: dict[str, Callable[[Path], None]] = {
    "docs/evaluate.md": _tables,
    "docs/migrating.md": _bundle_of_timm,
    "docs/python.md": _scans,
    "docs/score.md": _bundles_of_runs,
    "docs/tracking.md": _bundles_of_runs,
    "docs/training.md": _bundles_of_runs,
}
"""Page -> what it has besides."""


def make_buckets(folder: Path) -> None:
    """`s3://bucket` with images and a bundle, on the S3 server of the tests.

    Args:
        folder: what `make` made.
    """
    client = s3_client()
    client.create_bucket(Bucket="bucket")
    for name in ("cat", "dog"):
        for path in sorted((folder / "photos" / name).glob("*.jpg"))[:4]:
            for prefix in ("more", f"images/{name}"):
                client.put_object(Bucket="bucket", Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    for prefix, place in (("runs/flowers/bundle", folder / "DIR"), ("runs/nightly", folder / "runs" / "nightly")):
        for path in filter(Path.is_file, place.rglob("*")):
            client.put_object(Bucket="bucket", Key=f"{prefix}/{path.relative_to(place)}", Body=path.read_bytes())
