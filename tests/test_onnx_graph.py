"""ONNX surgery: what is read of a foreign graph, what is refused, and that the rebuilt graph predicts the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from foreign_models import CLASSES, FEATURES, SIDE_PX, edited, foreign_onnx
from onnx import TensorProto, helper

from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob, NormalizationConfig
from mnist_dist.importing.onnx_graph import build_onnx, graph_input, read_graph
from mnist_dist.importing.onnx_models import graph_facts, open_onnx
from mnist_dist.importing.recipe import Recipe, recipe_of
from mnist_dist.models.onnx_file import check_onnx

SCALE, OFFSET = (0.017, 0.018, 0.019), (-2.1, -2.0, -1.8)


def job(file: Path, **fields: Any) -> ImportJob:
    return ImportJob(source=str(file), output=str(file.with_suffix(".bundle")), **fields)


def recipe(file: Path, *, preset: Any = "0-1", channels: int = 3, **fields: Any) -> Recipe:
    asked = job(file, normalization=NormalizationConfig(preset=preset), **fields)
    return recipe_of(asked, open_onnx(asked, file.parent, lambda done, total: None), classes=None)


def built(file: Path, what: Recipe) -> onnxruntime.InferenceSession:
    target = file.with_name("built.onnx")
    build_onnx(file, what, target)
    check_onnx(target, spec=what.spec, num_classes=len(what.class_names))
    return onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])


def images(count: int = 3, *, channels: int = 3) -> Any:
    """Noise of another brightness and colour in each image."""
    random = np.random.default_rng(1)
    noise = random.random((count, SIDE_PX, SIDE_PX, channels)) * random.integers(10, 256, (count, 1, 1, channels))
    return noise.astype(np.uint8)


def original(file: Path, values: Any) -> list[Any]:
    """The outputs of the foreign file, one image at a time."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name, batch = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]
    times = batch if isinstance(batch, int) else 1
    rows = [session.run(None, {name: np.repeat(value[None], times, axis=0)}) for value in values]
    return [np.stack([np.asarray(row[index])[0] for row in rows]) for index in range(len(rows[0]))]


def softmax(values: Any) -> Any:
    powers = np.exp(np.asarray(values, np.float64) - np.max(values, axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("opset", [11, 12, 13, 17, 20])
def test_the_bundle_s_graph_predicts_what_the_foreign_one_does(tmp_path: Path, layout: str, opset: int) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", layout=layout, opset=opset)
    pixels = images()
    values = (pixels / np.float32(255)).astype(np.float32)
    (logits,) = original(file, values if layout == "NHWC" else values.transpose(0, 3, 1, 2))

    (probabilities,) = built(file, recipe(file)).run(["probabilities"], {"image": pixels})

    assert np.abs(probabilities - softmax(logits)).max() < 1e-6
    assert logits.std() > 0.1, "the images do not differ to this model"


def test_each_channel_has_its_own_scale_and_offset_and_their_order_can_be_reversed(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    base, pixels = recipe(file), images()
    what = Recipe(**{**vars(base), "scale": SCALE, "offset": OFFSET, "bgr": True})
    values = (pixels[..., ::-1] * np.array(SCALE) + np.array(OFFSET)).astype(np.float32)
    (logits,) = original(file, values.transpose(0, 3, 1, 2))

    (probabilities,) = built(file, what).run(["probabilities"], {"image": pixels})

    assert np.abs(probabilities - softmax(logits)).max() < 1e-5
    (unswapped,) = original(file, np.ascontiguousarray(values[..., ::-1]).transpose(0, 3, 1, 2))
    assert np.abs(probabilities - softmax(unswapped)).max() > 1e-3


def test_features_are_found_before_the_last_dense_layer_and_become_an_output(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", hidden=False)
    both = foreign_onnx(tmp_path / "b.onnx", hidden=True)
    pixels = images()
    _, pooled = original(both, (pixels / np.float32(255)).astype(np.float32).transpose(0, 3, 1, 2))

    session = built(file, recipe(file))

    assert [output.name for output in session.get_outputs()] == ["probabilities", "features"]
    assert session.get_outputs()[1].shape == ["N", FEATURES]
    assert np.abs(session.run(["features"], {"image": pixels})[0] - pooled).max() < 1e-5


def test_float16_fixed_batches_maps_and_grey_become_what_bundles_hold(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", dtype=TensorProto.FLOAT16, batch=2, as_map=True, channels=1)
    pixels = images(2, channels=1)
    values = (pixels / np.float32(255)).astype(np.float16).transpose(0, 3, 1, 2)
    (logits,) = original(file, values)

    session = built(file, recipe(file))

    assert session.get_inputs()[0].shape == [2, SIDE_PX, SIDE_PX, 1]
    (probabilities,) = session.run(["probabilities"], {"image": pixels})
    assert probabilities.dtype == np.float32
    assert np.abs(probabilities - softmax(logits[:, :, 0, 0])).max() < 5e-3


def test_a_uint8_graph_gets_its_pixels_as_they_are(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", dtype=TensorProto.UINT8, layout="NHWC")
    asked = job(file)
    what = recipe_of(asked, open_onnx(asked, tmp_path, lambda done, total: None), classes=None)
    pixels = images()
    (logits,) = original(file, pixels)

    (probabilities,) = built(file, what).run(["probabilities"], {"image": pixels})

    assert np.abs(probabilities - softmax(logits)).max() < 1e-6


@pytest.mark.parametrize(("activation", "multi_label"), [("Softmax", False), ("Sigmoid", True)])
def test_an_activation_inside_is_not_applied_again(tmp_path: Path, activation: str, multi_label: bool) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", activation=activation)
    what, pixels = recipe(file), images()
    (values,) = original(file, (pixels / np.float32(255)).astype(np.float32).transpose(0, 3, 1, 2))

    (probabilities,) = built(file, what).run(["probabilities"], {"image": pixels})

    assert (what.activation, what.multi_label) == ("none", multi_label)
    assert np.abs(probabilities - values).max() < 1e-6


@pytest.mark.parametrize("inside", [None, "Sigmoid"])
def test_one_output_becomes_two_classes(tmp_path: Path, inside: str | None) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", classes=1, activation=inside)
    pixels = images()
    (values,) = original(file, (pixels / np.float32(255)).astype(np.float32).transpose(0, 3, 1, 2))
    expected = values if inside else 1 / (1 + np.exp(-values))

    what = recipe(file)
    (probabilities,) = built(file, what).run(["probabilities"], {"image": pixels})

    assert what.is_binary
    assert what.class_names == ("0", "1")
    assert np.abs(probabilities - np.concatenate([1 - expected, expected], axis=1)).max() < 1e-6


def test_names_of_the_foreign_graph_may_be_those_of_the_bundle(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")

    def rename(model: Any) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [{"maps": "image", "logits": "probabilities"}.get(name, name) for name in names]
        model.graph.output[0].name = "probabilities"

    edited(file, model=rename)

    (probabilities,) = built(file, recipe(file)).run(["probabilities"], {"image": images()})

    assert np.allclose(probabilities.sum(axis=1), 1)


def test_what_no_output_needs_is_left_out(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", activation="Softmax")

    build_onnx(file, recipe(file, output_node="logits"), tmp_path / "built.onnx")

    model = onnx.load(str(tmp_path / "built.onnx"))
    outputs = {name for node in model.graph.node for name in node.output}
    assert "network/logits" in outputs
    assert "network/activated" not in outputs
    assert {tensor.name for tensor in model.graph.initializer} == {
        *(f"network/{name}" for name in ("kernel", "dense", "bias")),
        "image/scale",
    }


def test_the_file_says_which_classes_it_has(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    asked = job(file, normalization=NormalizationConfig(preset="raw"))
    names = ("ä", "b", "c", "d", "e")
    build_onnx(
        file,
        recipe_of(asked, open_onnx(asked, tmp_path, lambda done, total: None), classes=names),
        tmp_path / "built.onnx",
    )

    said = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "built.onnx")).metadata_props}

    assert json.loads(said["class_names"]) == list(names)
    assert said["activation"] == "softmax"
    assert json.loads(said["image_spec"])["height_px"] == SIDE_PX


def test_branches_keep_what_they_use_from_outside_and_of_their_own(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")

    def branch(model: Any) -> None:
        def of(name: str, factor: float) -> Any:
            own = onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor")
            node = helper.make_node("Mul", ["logits", "factor"], [name])
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES])
            return helper.make_graph([node], name, [], [value], [own])

        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        model.graph.initializer.append(yes)
        node = helper.make_node("If", ["yes"], ["chosen"], then_branch=of("then", 2.0), else_branch=of("else", 0.0))
        model.graph.node.append(node)
        model.graph.output[0].name = "chosen"

    edited(file, model=branch)
    pixels = images()
    (logits,) = original(file, (pixels / np.float32(255)).astype(np.float32).transpose(0, 3, 1, 2))

    (probabilities,) = built(file, recipe(file)).run(["probabilities"], {"image": pixels})

    assert np.abs(probabilities - softmax(logits)).max() < 1e-6


def test_a_file_of_the_first_ir_versions_is_rebuilt(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", opset=11)

    def older(model: Any) -> None:
        model.ir_version = 3
        for tensor in model.graph.initializer:
            shape = list(tensor.dims)
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))

    edited(file, model=older)

    (probabilities,) = built(file, recipe(file)).run(["probabilities"], {"image": images()})

    assert np.allclose(probabilities.sum(axis=1), 1)


# --- facts -----------------------------------------------------------------------------------------------------------


def test_sizes_that_the_graph_leaves_open_are_not_facts(tmp_path: Path) -> None:
    facts = graph_facts(foreign_onnx(tmp_path / "a.onnx", side="side"), job(tmp_path / "a.onnx"))

    assert (facts.height_px, facts.width_px, facts.is_size_fixed) == (None, None, False)
    assert (facts.num_outputs, facts.features, facts.output) == (CLASSES, "pooled", "logits")


def test_the_order_of_dimensions_is_seen_in_the_channels(tmp_path: Path) -> None:
    for layout in ("NCHW", "NHWC"):
        file = foreign_onnx(tmp_path / f"{layout}.onnx", layout=layout, batch=4)

        found = graph_input(read_graph(file), file=file)

        assert (found.layout, found.batch, found.channels) == (layout, 4, 3)


@pytest.mark.parametrize(("layout", "channels"), [("NCHW", 1), ("NCHW", 3), ("NHWC", 3)])
def test_a_file_that_names_all_sizes_shows_them_in_its_first_convolution(
    tmp_path: Path, layout: str, channels: int
) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", layout=layout, channels=channels, side="side")

    def unnamed(model: Any) -> None:
        for number, dim in enumerate(model.graph.input[0].type.tensor_type.shape.dim):
            dim.dim_param = f"d{number}"
        if layout == "NCHW":  # as TensorFlow pads
            pads = onnx.numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "pads")
            model.graph.initializer.append(pads)
            model.graph.node.insert(0, helper.make_node("Pad", ["pixels", "pads"], ["padded"]))
            model.graph.node[1].input[0] = "padded"

    edited(file, model=unnamed)

    found = graph_input(read_graph(file), file=file)

    assert (found.layout, found.channels, found.height_px) == (layout, channels, None)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(file: Path, message: str, **fields: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        graph_facts(file, job(file, **fields))


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    for data in (b"", b"\x80\x04\x95pickle", b"not a model" * 100, bytes(1000)):
        file.write_bytes(data)
        refused(file, "not an ONNX model")


def test_several_inputs_are_refused_by_name(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    other = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 7])
    edited(file, graph=lambda graph: graph.input.append(other))

    refused(file, "one input. Received: pixels, input_ids")


def test_weights_that_are_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    value = helper.make_tensor_value_info("bias", TensorProto.FLOAT, [CLASSES])
    edited(file, graph=lambda graph: graph.input.append(value))

    assert graph_facts(file, job(file)).num_outputs == CLASSES


def test_an_input_that_is_no_image_is_refused(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", channels=4)

    refused(file, r"1 or 3 channels. Received: 'pixels', float \[batch, 4, 32, 32\]")


def test_several_outputs_need_a_choice(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx", hidden=True, activation="Softmax")

    refused(file, "choose one with --output-node .*Received: activated, pooled")
    assert graph_facts(file, job(file, output_node="activated")).num_outputs == CLASSES


def test_an_unknown_node_is_refused_with_the_outputs(tmp_path: Path) -> None:
    refused(foreign_onnx(tmp_path / "a.onnx"), "no tensor of that name .its outputs: logits", output_node="nothing")
    refused(foreign_onnx(tmp_path / "a.onnx"), "--features-node 'nothing'", features_node="nothing")


def test_custom_operators_are_refused(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")

    def use(model: Any) -> None:
        model.graph.node[1].domain = "com.evil"
        model.opset_import.append(helper.make_opsetid("com.evil", 1))

    edited(file, model=use)

    refused(file, "no operator Relu of the domain 'com.evil'")


def test_a_custom_operator_inside_a_branch_is_seen(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    inner = helper.make_node("Relu", ["maps"], ["inner"], domain="com.evil")
    branch = helper.make_graph([inner], "then", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch)
    edited(file, graph=lambda graph: graph.node.append(node))

    refused(file, "com.evil")


def test_old_operators_are_refused(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    edited(file, model=lambda model: setattr(model.opset_import[0], "version", 9))

    refused(file, "opset 11 or newer. Received: 9")


@pytest.mark.parametrize(
    ("location", "hint"),
    [
        ("../secret.bin", r"\."),
        ("/etc/passwd", r"\."),
        ("link.bin", r"; it is a link, .*: `cp -rL FOLDER COPY`, and import the copy\."),
    ],
)
def test_data_outside_of_the_folder_is_never_read(tmp_path: Path, location: str, hint: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(10_000))
    file = foreign_onnx(tmp_path / "model" / "a.onnx")
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")

    def move(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.append(onnx.StringStringEntryProto(key="location", value=location))

    edited(file, graph=move)

    refused(file, f"must lie in its own folder{hint} Received: ")


def test_external_data_beside_the_file_are_taken_into_it(tmp_path: Path) -> None:
    plain = foreign_onnx(tmp_path / "a.onnx")
    outside = tmp_path / "b" / "b.onnx"
    outside.parent.mkdir()
    onnx.save(onnx.load(str(plain)), str(outside), save_as_external_data=True, location="b.data", size_threshold=0)
    pixels = images()

    (expected,) = built(plain, recipe(plain)).run(["probabilities"], {"image": pixels})
    (probabilities,) = built(outside, recipe(outside)).run(["probabilities"], {"image": pixels})

    assert np.array_equal(probabilities, expected)
    (outside.parent / "b.data").unlink()
    refused(outside, "a file of the model is missing. Received: 'b.data'")


def test_the_file_itself_may_be_a_link_out_of_its_folder(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "blobs" / "5f0c")
    link = tmp_path / "snapshot" / "model.onnx"
    link.parent.mkdir()
    link.symlink_to(file)

    (probabilities,) = built(link, recipe(link)).run(["probabilities"], {"image": images()})

    (expected,) = built(file, recipe(file)).run(["probabilities"], {"image": images()})
    assert np.array_equal(probabilities, expected)


def test_a_size_that_contradicts_the_graph_is_refused(tmp_path: Path) -> None:
    file = foreign_onnx(tmp_path / "a.onnx")
    what = recipe(file)
    wrong = Recipe(**{**vars(what), "spec": ImageSpec(height_px=2, width_px=2, channels=3)})

    with pytest.raises(ConfigError, match=r"the graph takes images of \(32, 32, 3\)\. Received: \(2, 2, 3\)"):
        build_onnx(file, wrong, tmp_path / "built.onnx")
