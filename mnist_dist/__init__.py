"""Distributed batch training and scoring of image classifiers with Ray and Keras.

A finished model is a folder called a *bundle*:

    import mnist_dist

    bundle = mnist_dist.load_bundle("runs/quickstart/bundle")
    bundle.predict("digit.png").predicted_class

A prediction table is read, whatever other files its folder holds, with

    mnist_dist.read_predictions("predictions", columns=["uri", "predicted_class"])

Every command is also a function (`mnist_dist.api`):

    trained = mnist_dist.train("quickstart", storage="runs", name="first", epochs=[5])
    scored = mnist_dist.score(bundle=trained.values["bundle"], input="photos", output="predictions")
    scored.table().to_pandas()

Importing the package does not import Ray, Keras, TensorFlow or pyarrow: the names below are looked up on first use
(PEP 562).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_dist.api import combine, evaluate, export, import_model, report, score, search, train
    from mnist_dist.models.bundle import load_bundle
    from mnist_dist.scoring.predictions import read_predictions

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "combine",
    "evaluate",
    "export",
    "import_model",
    "load_bundle",
    "read_predictions",
    "report",
    "score",
    "search",
    "train",
]
_MODULES = {
    "load_bundle": "mnist_dist.models.bundle",
    "read_predictions": "mnist_dist.scoring.predictions",
    **dict.fromkeys(("combine", "evaluate", "export", "import_model"), "mnist_dist.api"),
    **dict.fromkeys(("report", "score", "search", "train"), "mnist_dist.api"),
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'mnist_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
