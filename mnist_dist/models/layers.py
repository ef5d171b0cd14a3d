"""The layers of a Keras model as data, for reports: name, type, output shape, number of weights.

Keras' own `summary` is text, cut to the width of a terminal that a worker does not have. This module loads Keras only
where a model is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer, or a model inside a model, whose layers follow it."""

    name: str
    kind: str
    """Its class, such as `Conv2D`."""
    output: str
    """Shape of its output, such as `8x8x32`, without the batch; empty if it is not known."""
    parameters: int
    """Number of weights, those of its own layers included."""
    depth: int = 0
    """How many models it is inside of."""


def layers_of(model: keras.Model) -> list[Layer]:
    """The layers in the order of the graph, those of a nested model behind it."""
    return list(_walk(model, depth=0))


def layers_text(layers: Sequence[Layer]) -> str:
    """The layers as lines of text, with columns as wide as their longest cell."""
    rows = [("layer", "type", "output", "parameters")]
    rows += [("  " * one.depth + one.name, one.kind, one.output, f"{one.parameters:,}") for one in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])] for row in rows]
    total = sum(one.parameters for one in layers if one.depth == 0)
    return "\n".join(["  ".join(line) for line in lines] + [f"\n{total:,} parameters"]) + "\n"


def _walk(model: keras.Model, *, depth: int) -> Iterator[Layer]:
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer) and depth:
            continue  # It repeats the input of the model that it is in.
        yield Layer(
            name=layer.name,
            kind=type(layer).__name__,
            output=_output(layer),
            parameters=int(layer.count_params()),
            depth=depth,
        )
        if isinstance(layer, keras.Model):
            yield from _walk(layer, depth=depth + 1)


def _output(layer: keras.Layer) -> str:
    try:
        output = layer.output
    except (AttributeError, ValueError):  # It was never called, or on several inputs.
        return ""
    if isinstance(output, list | tuple):
        return ", ".join(_shape(one.shape) for one in output)
    return _shape(output.shape)


def _shape(shape: Sequence[int | None]) -> str:
    return "x".join("any" if size is None else str(size) for size in shape[1:]) or "1"
