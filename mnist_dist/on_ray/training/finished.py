"""The finished classifier of a run, which is tested and written: a Keras model, or an imported backbone with a head.

Owns: joining backbone and head, checking the joined model, and how each kind is predicted with and written. Does not
own: the metrics (`tested`), or the rest of the bundle (`bundling`).
"""

# n = images, D = features, K = classes

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import keras
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import Activation
from mnist_dist.data.records import Records
from mnist_dist.errors import MnistDistError
from mnist_dist.models.bundle import BundleInfo, Imported, load_bundle, write_bundle, write_model_bundle
from mnist_dist.models.classifier import Classifier
from mnist_dist.models.history import HISTORY_FILE, Epoch, history_csv
from mnist_dist.models.layers import Layer, layers_of
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES, open_session, run_session
from mnist_dist.models.onnx_head import Dense, join_head
from mnist_dist.training.feature_engine import difference
from mnist_dist.training.loop import Trainer

Values = npt.NDArray[np.float32]

MAX_DIFFERENCE = 1e-4  # of a probability of the joined model and of the head that was trained
MAX_FEATURE_DIFFERENCE = 5e-3  # norm-relative, of features that may be stored as float16
COMPARED_FEATURES = 64
BATCH_SIZE = 32


class FinishedModel(Protocol):
    """A finished classifier in float32."""

    @property
    def layers(self) -> list[Layer]:
        """Its layers, for the report."""

    @property
    def parameters(self) -> int:
        """Number of weights."""

    def logits(self, rows: npt.NDArray[np.int64]) -> Values:
        """Logits `float32 [n, K]`, up to a constant per image, of this worker's share of test images:
        `rows[rank::workers]`.

        Raises:
            MeasuringStopped: the host asks to stop.
        """

    def write(
        self, folder: Path, info: BundleInfo, *, history: Iterable[Epoch], calibration: pa.Table | None
    ) -> BundleInfo:
        """Writes the bundle into a new folder and gives its info; the fields about the model are filled in."""


class KerasModel:
    """A classifier that Keras runs whole.

    Args:
        trainer: of this worker.
        classifier: with the best weights.
    """

    def __init__(self, trainer: Trainer, classifier: Classifier) -> None:
        self._trainer, self._classifier = trainer, classifier

    @property
    def layers(self) -> list[Layer]:
        return layers_of(self._classifier.model)

    @property
    def parameters(self) -> int:
        return int(self._classifier.model.count_params())

    def logits(self, rows: npt.NDArray[np.int64]) -> Values:
        return self._trainer.predict(rows, self._classifier.network)

    def write(
        self, folder: Path, info: BundleInfo, *, history: Iterable[Epoch], calibration: pa.Table | None
    ) -> BundleInfo:
        return write_bundle(folder, self._classifier.model, info, history=history, calibration=calibration)


class JoinedModel:
    """An imported backbone and a trained head in one ONNX file, in ONNX Runtime.

    Args:
        backbone: URI of the backbone's bundle.
        trainer: of this worker; its images are features.
        head: `float32 [n, D]` -> `float32 [n, K]` logits, with the best weights.
        records: the images.
        file: where to write the model.
        cpus: cores that ONNX Runtime may use.

    Raises:
        BundleError: the bundle is not there any more, or has changed.
        MnistDistError: the joined model does not give the features that the head was trained on.
    """

    def __init__(
        self, backbone: str, *, trainer: Trainer, head: keras.Model, records: Records, file: Path, cpus: int
    ) -> None:
        bundle = load_bundle(backbone)
        self._info, self._trainer, self._head, self._records, self._file = bundle.info, trainer, head, records, file
        self._multi_label = bool(records.label_sets)
        self._backbone_parameters = join_head(
            bundle.model_path,
            dense_layers(head),
            file,
            class_names=records.class_names,
            multi_label=self._multi_label,
        )
        self._session = open_session(file, cpus=cpus)
        self._batch_size = bundle.fixed_batch or BATCH_SIZE
        self._check_features()

    @property
    def layers(self) -> list[Layer]:
        head = layers_of(self._head)
        kind, parameters = f"model {self._info.model_id[:12]}", self._backbone_parameters
        backbone = Layer(name=self._info.backbone, kind=kind, output=head[0].output, parameters=parameters)
        return [backbone, *(layer for layer in head if layer.kind != "InputLayer")]

    @property
    def parameters(self) -> int:
        return self._backbone_parameters + int(self._head.count_params())

    def logits(self, rows: npt.NDArray[np.int64]) -> Values:
        """See `FinishedModel`; each probability is compared with that of the head alone.

        Raises:
            MnistDistError: they differ.
            MeasuringStopped: see `FinishedModel`.
        """
        world = self._trainer.world
        share = rows[world.rank :: world.workers]
        probabilities, features = self._outputs(share, of_test=len(rows))
        activation = keras.ops.sigmoid if self._multi_label else keras.ops.softmax
        expected = activation(self._head(features, training=False)) if len(share) else probabilities
        apart = float(np.abs(np.asarray(expected) - probabilities).max(initial=0))
        if not apart <= MAX_DIFFERENCE:  # Written so that NaN does not pass.
            raise MnistDistError(f"the joined model differs from its head: a probability by {apart:.3g}")
        smallest = np.finfo(np.float32).tiny
        logits = np.log(np.maximum(probabilities, smallest))
        return logits - np.log(np.maximum(1 - probabilities, smallest)) if self._multi_label else logits

    def write(
        self, folder: Path, info: BundleInfo, *, history: Iterable[Epoch], calibration: pa.Table | None
    ) -> BundleInfo:
        of_backbone = self._info
        info = replace(
            info,
            backbone=of_backbone.backbone,
            weights=of_backbone.model_id,
            imported=None if of_backbone.imported is None else _of_head(of_backbone.imported, info.multi_label),
        )
        extra = {HISTORY_FILE: history_csv(history)}
        return write_model_bundle(folder, self._file, info, calibration=calibration, extra=extra)

    def _check_features(self) -> None:
        """Compares the features of some validation images with the stored ones."""
        images = self._trainer.task.images
        rows = images.validation[:COMPARED_FEATURES]
        stored = np.asarray(images.pixels[rows], np.float32)
        apart = difference(stored, self._outputs(rows)[1])
        if not apart <= MAX_FEATURE_DIFFERENCE:
            raise MnistDistError(
                f"the joined model's features differ from those that the head was trained on: by {apart:.3g} of their "
                "norm"
            )

    def _outputs(self, rows: npt.NDArray[np.int64], *, of_test: int = 0) -> tuple[Values, Values]:
        """Probabilities `float32 [n, K]` and features `float32 [n, D]`.

        Args:
            rows: the records.
            of_test: how many test images `rows` is a share of, to report progress to the host; 0: report nothing.
        """
        if not len(rows):
            classes = len(self._records.class_names)
            return np.zeros((0, classes), np.float32), np.zeros((0, self._head.input_shape[1]), np.float32)
        parts, workers = [], self._trainer.world.workers
        for start in range(0, len(rows), self._batch_size):
            pixels = self._records.pixels[rows[start : start + self._batch_size]]
            parts.append(run_session(self._session, pixels, _OUTPUTS))
            if of_test:
                self._trainer.measured("test", (start + len(pixels)) * workers, of_test)
        probabilities, features = (np.concatenate(values) for values in zip(*parts, strict=True))
        return probabilities, features


_OUTPUTS = (PROBABILITIES, FEATURES)


def dense_layers(head: keras.Model) -> list[Dense]:
    """The weights of a head's dense layers, in order."""
    found = [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]
    pairs = [[np.asarray(weight, np.float32) for weight in layer.get_weights()] for layer in found]
    return [Dense(kernel=kernel, bias=bias) for kernel, bias in pairs]


def _of_head(imported: Imported, multi_label: bool) -> Imported:
    """What is known of the backbone's import, without what was said of its own classes."""
    activation: Activation = "sigmoid" if multi_label else "softmax"
    return replace(imported, activation=activation, assumed=(), fast_agreement=None, fast_images=0)
