"""Distributed batch training and scoring of image classifiers with Ray and Keras.

A finished model is a folder, a *bundle*:

    import mnist_dist

    bundle = mnist_dist.load_bundle("runs/quickstart/bundle")
    bundle.predict("digit.png").predicted_class

and a table of predictions is read, whatever else lies in its folder, with

    mnist_dist.read_predictions("predictions", columns=["uri", "predicted_class"])

Importing the package imports neither Ray nor Keras, TensorFlow or pyarrow: the names below are looked up when they
are first used (PEP 562).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_dist.models.bundle import load_bundle
    from mnist_dist.scoring.predictions import read_predictions

__version__ = "0.1.0"

__all__ = ["__version__", "load_bundle", "read_predictions"]


def __getattr__(name: str) -> object:
    if name == "load_bundle":
        from mnist_dist.models.bundle import load_bundle

        return load_bundle
    if name == "read_predictions":
        from mnist_dist.scoring.predictions import read_predictions

        return read_predictions
    raise AttributeError(f"module 'mnist_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
