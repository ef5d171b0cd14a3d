"""onnx_head: an ONNX backbone with a new head gives what the head gives for its features, and nothing else is left."""

import itertools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx_backbones import WIDTH, random_features
from onnx_models import NAMES, NUM_FEATURES, small_bundle, some_pixels

from mnist_dist.errors import BundleError
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES, check_onnx, open_session, run_session
from mnist_dist.models.onnx_head import Dense, count_weights, join_head

CLASSES = ("x", "y", "zé")


def head(*widths: int, seed: int = 2) -> list[Dense]:
    """Dense layers between these widths."""
    random = np.random.default_rng(seed)
    return [
        Dense(
            kernel=random.normal(0, 1, (before, after)).astype(np.float32),
            bias=random.normal(0, 1, after).astype(np.float32),
        )
        for before, after in itertools.pairwise(widths)
    ]


def expected(features: npt.NDArray[np.float32], layers: list[Dense]) -> npt.NDArray[np.float64]:
    values = features.astype(np.float64)
    for number, layer in enumerate(layers, start=1):
        values = values @ layer.kernel + layer.bias
        values = values if number == len(layers) else np.maximum(values, 0)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("hidden", [(), (5,)], ids=["one layer", "a hidden layer"])
@pytest.mark.parametrize("names", [NAMES, ()], ids=["a classifier", "a backbone alone"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_joined_model_gives_the_heads_probabilities_of_the_backbones_features(
    tmp_path: Path, hidden: tuple[int, ...], names: tuple[str, ...], batch_size: int | None
) -> None:
    backbone, layers = small_bundle(tmp_path / "b", names=names, batch_size=batch_size), head(NUM_FEATURES, *hidden, 3)
    join_head(backbone.model_path, layers, tmp_path / "joined.onnx", class_names=CLASSES)
    check_onnx(tmp_path / "joined.onnx", spec=backbone.info.spec, num_classes=3)
    pixels = some_pixels(3)
    probabilities, features = run_session(open_session(tmp_path / "joined.onnx"), pixels, (PROBABILITIES, FEATURES))
    (of_backbone,) = run_session(backbone.session, pixels, (FEATURES,))
    np.testing.assert_array_equal(features, of_backbone)
    np.testing.assert_allclose(probabilities, expected(of_backbone, layers), atol=1e-6)
    assert np.ptp(probabilities, axis=0).max() > 0.01, "all images look alike to this backbone"


def test_what_only_the_old_classes_needed_is_left_out(tmp_path: Path) -> None:
    backbone = random_features(tmp_path / "b", classes=4)
    count = join_head(backbone.model_path, head(WIDTH, 3), tmp_path / "joined.onnx", class_names=CLASSES)
    graph = onnx.load(tmp_path / "joined.onnx").graph
    assert [node.op_type for node in graph.node].count("Softmax") == 1
    assert count == count_weights(backbone.model_path) == 11 * 9 * WIDTH + WIDTH + 1
    assert sum(np.prod(tensor.dims) for tensor in graph.initializer) == count + WIDTH * 3 + 3


def test_weights_that_only_an_inner_graph_takes_stay(tmp_path: Path) -> None:
    backbone = random_features(tmp_path / "b")
    join_head(backbone.model_path, head(WIDTH, 3), tmp_path / "joined.onnx", class_names=CLASSES)
    assert "shift" in {tensor.name for tensor in onnx.load(tmp_path / "joined.onnx").graph.initializer}


def test_a_joined_model_is_a_backbone_again(tmp_path: Path) -> None:
    backbone, layers = random_features(tmp_path / "b"), head(WIDTH, 7, 3)
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    join_head(backbone.model_path, head(WIDTH, 6, 4, seed=9), first, class_names=tuple("abcd"))
    join_head(first, layers, second, class_names=CLASSES)
    join_head(backbone.model_path, layers, tmp_path / "at_once.onnx", class_names=CLASSES)
    assert second.read_bytes() == (tmp_path / "at_once.onnx").read_bytes()


def test_a_name_of_the_backbone_is_not_taken_again(tmp_path: Path) -> None:
    backbone = small_bundle(tmp_path / "b", names=())
    model = onnx.load(backbone.model_path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = {"means": "head_dense_1", "kernel": "head_kernel_1"}.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = {"kernel": "head_kernel_1"}.get(tensor.name, tensor.name)
    onnx.save(model, tmp_path / "renamed.onnx")
    layers = head(NUM_FEATURES, 3)
    for name, source in (("renamed", tmp_path / "renamed.onnx"), ("plain", backbone.model_path)):
        join_head(source, layers, tmp_path / f"{name}-joined.onnx", class_names=CLASSES)
    ours, theirs = (
        run_session(open_session(tmp_path / f"{name}-joined.onnx"), some_pixels(3), (PROBABILITIES,))[0]
        for name in ("renamed", "plain")
    )
    np.testing.assert_array_equal(ours, theirs)


def test_the_file_names_its_classes_and_keeps_what_the_backbone_said(tmp_path: Path) -> None:
    backbone = small_bundle(tmp_path / "b")
    model = onnx.load(backbone.model_path)
    onnx.helper.set_model_props(model, {"class_names": "[]", "spec": "theirs"})
    onnx.save(model, tmp_path / "named.onnx")
    join_head(tmp_path / "named.onnx", head(NUM_FEATURES, 3), tmp_path / "joined.onnx", class_names=CLASSES)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "joined.onnx").metadata_props}
    assert (facts["spec"], facts["activation"], facts["multi_label"]) == ("theirs", "softmax", "false")
    assert json.loads(facts["class_names"]) == list(CLASSES)


def test_a_head_for_other_features_is_refused(tmp_path: Path) -> None:
    backbone = small_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match=r"takes 7 features\. Received: 6"):
        join_head(backbone.model_path, head(7, 3), tmp_path / "joined.onnx", class_names=CLASSES)


def test_features_that_follow_from_the_probabilities_are_refused(tmp_path: Path) -> None:
    backbone = small_bundle(tmp_path / "b")
    model = onnx.load(backbone.model_path)
    for node in model.graph.node:
        if FEATURES in node.output:
            node.output[0] = "means_2"
        node.input[:] = ["means_2" if name == FEATURES else name for name in node.input]
    model.graph.node.append(onnx.helper.make_node("Identity", [PROBABILITIES], [FEATURES]))
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = len(NAMES)
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(BundleError, match="follow from probabilities make no backbone"):
        join_head(tmp_path / "odd.onnx", head(len(NAMES), 3), tmp_path / "joined.onnx", class_names=CLASSES)
