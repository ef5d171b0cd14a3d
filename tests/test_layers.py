"""layers: the table of a model's layers, made from the model and not from printed text."""

import keras
import pytest

from mnist_dist.config import ModelConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.classifier import build_classifier
from mnist_dist.models.layers import Layer, layers_of, layers_text


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """A classifier of `uint8 [B, 9, 11, 1]` with the small CNN inside."""
    spec = ImageSpec(height_px=9, width_px=11, channels=1)
    return build_classifier(ModelConfig(backbone="cnn"), spec=spec, num_classes=7).model


def test_each_layer_has_its_type_its_output_and_its_weights(model: keras.Model) -> None:
    by_name = {layer.name: layer for layer in layers_of(model)}
    assert by_name["conv1"] == Layer(
        name="conv1", kind="Conv2D", output="9x11x32", parameters=3 * 3 * 1 * 32 + 32, depth=1
    )
    assert (by_name["logits"].output, by_name["logits"].parameters, by_name["logits"].depth) == ("7", 129 * 7, 0)


def test_a_nested_model_holds_the_weights_of_its_layers(model: keras.Model) -> None:
    layers = layers_of(model)
    nested = next(layer for layer in layers if layer.name == "backbone")
    inside = [layer for layer in layers if layer.depth == 1]
    assert nested.parameters == sum(layer.parameters for layer in inside)
    assert sum(layer.parameters for layer in layers if layer.depth == 0) == model.count_params()
    assert "InputLayer" not in {layer.kind for layer in inside}


def test_the_text_has_every_column_in_any_terminal(model: keras.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = layers_text(layers_of(model)).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters"]
    conv1 = next(line for line in lines if "conv1" in line)
    assert conv1.startswith("  conv1")
    assert conv1.endswith(" 320")
    assert lines[-1] == f"{model.count_params():,} parameters"


def test_a_layer_that_was_never_called_has_no_output() -> None:
    model = keras.Sequential([keras.layers.Dense(3)])
    model.layers[0].build((None, 5))
    (dense,) = layers_of(model)
    assert (dense.output, dense.parameters) == ("", 18)
