"""Foreign SavedModels: the ONNX file made of one, what is read from it, and what is refused."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mnist_dist.errors import ConfigError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Asked, Foreign
from mnist_dist.importing.saved_models import check_operations, open_saved_model, whole_pipeline

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install -e '.[export]')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (pip install -e '.[export]')")
# tf2onnx 1.17 and NumPy 2; protobuf's generated code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

layers = keras.layers
HEIGHT, WIDTH, CLASSES = 9, 11, 4
SPEC = ImageSpec(height_px=HEIGHT, width_px=WIDTH, channels=3, resampling="keras", antialias=False, quality="exact")
FLOATS = tf.TensorSpec([None, HEIGHT, WIDTH, 3], tf.float32, name="pixels")


def pixels(images: int = 3) -> Pixels:
    return np.random.default_rng(images).integers(0, 256, (images, *SPEC.shape), dtype=np.uint8)


def png(values: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def classifier(*first: Any) -> keras.Model:
    keras.utils.set_random_seed(4)
    parts = [layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Dropout(0.4), layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input(SPEC.shape), *first, *parts, layers.Dense(CLASSES, "softmax")])


class Network(tf.Module):
    """A plain module of TensorFlow: logits of flattened pixels, after whatever `act` does to them."""

    def __init__(self, act: Callable[[Any], Any] = lambda x: x) -> None:
        super().__init__()
        start = np.random.default_rng(1).normal(size=(HEIGHT * WIDTH * 3, CLASSES)) / 255
        self.weight, self.act = tf.Variable(start, dtype=tf.float32), act

    def logits(self, images: Any) -> Any:
        return tf.matmul(tf.reshape(self.act(images), [-1, HEIGHT * WIDTH * 3]), self.weight)


def save(module: Any, folder: Path, **signatures: Any) -> Path:
    tf.saved_model.save(module, str(folder), signatures=signatures or None)
    return folder


def function_of(body: Callable[[Any], Any], spec: Any = FLOATS) -> Any:
    return tf.function(body, input_signature=[spec])


def save_network(folder: Path, act: Callable[[Any], Any] = lambda x: x, *, key: str = "serving_default") -> Path:
    module = Network(act)
    return save(module, folder, **{key: function_of(lambda pixels: {"scores": module.logits(pixels)})})


def open_folder(folder: Path, scratch: Path, **flags: Any) -> Foreign:
    scratch.mkdir(exist_ok=True)
    return open_saved_model(ImportJob(source=str(folder), output="bundle", **flags), scratch, lambda done, total: None)


def run_onnx(foreign: Foreign, images: Any) -> Any:
    session = onnxruntime.InferenceSession(foreign.file, providers=["CPUExecutionProvider"])
    return session.run([foreign.facts.output], {"image": images})[0]


def asked(foreign: Foreign, **changes: Any) -> Asked:
    values: dict[str, Any] = {"scale": (1.0,), "offset": (0.0,), "bgr": False, "activation": "none"}
    return Asked(**{"spec": SPEC, "output": foreign.facts.output, **values, **changes})


# --- models ----------------------------------------------------------------------------------------------------------


def test_an_export_of_keras_becomes_an_onnx_file(tmp_path: Path) -> None:
    model = classifier(layers.Rescaling(1 / 127.5, -1), layers.Normalization(mean=[0.1] * 3, variance=[0.5] * 3))
    model.export(tmp_path / "exported", verbose=False)
    foreign = open_folder(tmp_path / "exported", tmp_path / "scratch")

    facts, images = foreign.facts, pixels().astype(np.float32)
    assert (foreign.kind, foreign.name) == ("saved_model", "exported")
    assert (facts.height_px, facts.width_px, facts.channels, facts.num_outputs) == (HEIGHT, WIDTH, 3, CLASSES)
    assert (facts.activation, facts.multi_label, facts.scale, facts.output) == ("none", False, (1.0,), "output_0")
    fitting = (facts.resize, facts.resampling, facts.interpolation, facts.antialias)
    assert (facts.framework, fitting) == ("keras", (None,) * 4), "no SavedModel says how images were fitted"
    expected = np.asarray(model(images, training=False))
    np.testing.assert_allclose(run_onnx(foreign, images), expected, atol=1e-6)
    assert foreign.reference is not None
    encoded = [png(image) for image in pixels()]
    np.testing.assert_allclose(foreign.reference(encoded, asked(foreign)), expected, atol=1e-6)
    np.testing.assert_allclose(whole_pipeline(tmp_path / "exported", encoded, asked(foreign)), expected, atol=1e-6)
    halved = foreign.reference(encoded, asked(foreign, scale=(0.5,)))
    assert np.abs(halved - expected).max() > 1e-3


def test_a_module_of_tensorflow_with_branches_becomes_an_onnx_file(tmp_path: Path) -> None:
    def brighten(images: Any) -> Any:
        return tf.cond(tf.reduce_mean(images) < 10.0, lambda: images * 3.0, lambda: images)

    module = Network(brighten)
    names = {"a_copy": tf.identity, "scores": lambda pixels: tf.sigmoid(module.logits(pixels))}
    serve = function_of(lambda pixels: {name: call(pixels) for name, call in names.items()})
    save(module, tmp_path / "m", predict=serve)
    foreign = open_folder(tmp_path / "m", tmp_path / "scratch", output_node="scores")

    assert (foreign.facts.output, foreign.facts.activation, foreign.facts.multi_label) == ("scores", "none", True)
    for images in (pixels().astype(np.float32), pixels().astype(np.float32) / 255):
        np.testing.assert_allclose(run_onnx(foreign, images), serve(images)["scores"], atol=1e-5)


@pytest.mark.parametrize(
    ("act", "scale", "reason"),
    [
        (lambda x: x / 255.0, (1.0,), "it normalises pixels of 0-255 itself"),
        (lambda x: x * 2.0 - 1.0, None, "does not look as if it expected 0-255"),
        (lambda x: x, None, ""),
    ],
)
def test_the_first_operations_show_what_values_are_expected(
    act: Callable[[Any], Any], scale: tuple[float, ...] | None, reason: str, tmp_path: Path
) -> None:
    facts = open_folder(save_network(tmp_path / "m", act), tmp_path / "scratch").facts
    assert facts.scale == scale
    assert reason in " ".join(facts.why)
    assert (facts.activation, facts.output, facts.num_outputs) == (None, "scores", CLASSES)


def test_a_fixed_batch_and_bytes_are_taken(tmp_path: Path) -> None:
    module = Network(lambda images: tf.cast(images, tf.float32))
    spec = tf.TensorSpec([2, HEIGHT, WIDTH, 3], tf.uint8, name="pixels")
    save(module, tmp_path / "m", serving_default=function_of(lambda pixels: {"s": module.logits(pixels)}, spec))
    foreign = open_folder(tmp_path / "m", tmp_path / "scratch")

    assert (foreign.facts.scale, foreign.facts.why) == ((1.0,), ("it takes uint8, 0-255",))
    expected = module.logits(pixels())
    assert foreign.reference is not None
    found = foreign.reference([png(image) for image in pixels()], asked(foreign))  # three images, two at a time
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(run_onnx(foreign, pixels()[:2]), expected[:2], rtol=1e-4)


def test_channels_first_are_told_and_the_reference_knows(tmp_path: Path) -> None:
    module = Network(lambda images: tf.transpose(images, [0, 2, 3, 1]))
    spec = tf.TensorSpec([None, 3, HEIGHT, WIDTH], tf.float32, name="pixels")
    save(module, tmp_path / "m", serving_default=function_of(lambda pixels: {"s": module.logits(pixels)}, spec))
    foreign = open_folder(tmp_path / "m", tmp_path / "scratch")

    assert (foreign.facts.height_px, foreign.facts.width_px, foreign.facts.channels) == (HEIGHT, WIDTH, 3)
    assert foreign.reference is not None
    found = foreign.reference([png(image) for image in pixels()], asked(foreign))
    np.testing.assert_allclose(found, Network().logits(pixels().astype(np.float32)), rtol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [lambda: layers.Resizing(8, 7), lambda: layers.CenterCrop(8, 7), lambda: layers.RandomFlip()]
)
def test_an_export_in_training_mode_is_refused(first: Callable[[], Any], tmp_path: Path) -> None:
    classifier(first()).export(tmp_path / "m", verbose=False)
    with pytest.raises(ConfigError, match=r"trains. Keras exports a model with layers.*import its `.keras` file"):
        open_folder(tmp_path / "m", tmp_path / "scratch")


def save_two_signatures(folder: Path) -> None:
    module = Network()
    serve = function_of(lambda pixels: {"scores": module.logits(pixels)})
    save(module, folder, first=serve, second=serve)


def save_two_inputs(folder: Path) -> None:
    module = Network()
    signature = [FLOATS, tf.TensorSpec([], tf.float32, name="factor")]
    both = tf.function(lambda pixels, factor: {"s": module.logits(pixels) * factor}, input_signature=signature)
    save(module, folder, serving_default=both)


def save_text_input(folder: Path) -> None:
    spec = tf.TensorSpec([None], tf.string, name="text")
    save(tf.Module(), folder, serving_default=function_of(lambda text: {"s": tf.identity(text)}, spec))


def save_two_outputs(folder: Path) -> None:
    module = Network()
    save(module, folder, serving_default=function_of(lambda pixels: {"age": module.logits(pixels), "kind": pixels}))


def save_by_tensorflow_1(folder: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        image = tf.compat.v1.placeholder(tf.float32, [None, HEIGHT, WIDTH, 3])
        tf.compat.v1.saved_model.simple_save(
            session, str(folder), {"image": image}, {"s": tf.reduce_mean(image, [1, 2])}
        )


def write_pickle(folder: Path) -> None:
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"\x80\x04cos\nsystem\n.")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no signature": (lambda folder: save(tf.Module(), folder), "must have the signature.*Received: no signatures"),
    "two signatures": (save_two_signatures, "must have the signature serving_default.*Received: first, second"),
    "two inputs": (save_two_inputs, "must have one input, the image. Received: .*factor"),
    "text": (save_text_input, r"must take images.*Received: string \[None\]"),
    "two outputs": (save_two_outputs, "choose one with --output-node. Received: age, kind"),
    "TensorFlow 1": (save_by_tensorflow_1, "saved by TensorFlow 2"),
    "no SavedModel": (lambda folder: folder.mkdir(), "is no SavedModel"),
    "other bytes": (write_pickle, "is no SavedModel"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_classifier_of_images_is_refused(case: str, tmp_path: Path) -> None:
    write, message = UNUSABLE[case]
    write(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        open_folder(tmp_path / "m", tmp_path / "scratch")


def touched(canary: Path, images: Any) -> Any:
    """The images, once a file is there: by Python."""
    canary.touch()
    return images


def written(canary: Path, images: Any) -> Any:
    """The images, once a file is there: by an operation."""
    tf.io.write_file(str(canary), "x")
    return images


def with_python(folder: Path, canary: Path) -> None:
    def act(images: Any) -> Any:
        return tf.ensure_shape(tf.py_function(partial(touched, canary), [images], tf.float32), FLOATS.shape)

    save_network(folder, act)


def with_numpy(folder: Path, canary: Path) -> None:
    def act(images: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(partial(touched, canary), [images], tf.float32), FLOATS.shape)

    save_network(folder, act)


def with_write(folder: Path, canary: Path) -> None:
    save_network(folder, partial(written, canary))


def with_write_elsewhere(folder: Path, canary: Path) -> None:
    module = Network()
    module.other = function_of(partial(written, canary))
    save(module, folder, serving_default=function_of(lambda pixels: {"scores": module.logits(pixels)}))


def with_read(folder: Path, canary: Path) -> None:
    save_network(
        folder, lambda images: images + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)
    )


def with_save(folder: Path, canary: Path) -> None:
    def act(images: Any) -> Any:
        tf.raw_ops.SaveV2(prefix=str(canary), tensor_names=["x"], shape_and_slices=[""], tensors=[tf.ones([2])])
        return images

    save_network(folder, act)


class Resource(tf.saved_model.experimental.TrackableResource):
    """Writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        super().__init__()
        self.canary = str(canary)

    def _create_resource(self) -> Any:
        return tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)

    def _initialize(self) -> None:
        tf.raw_ops.SaveV2(prefix=self.canary, tensor_names=["x"], shape_and_slices=[""], tensors=[tf.ones([2])])


def with_resource(folder: Path, canary: Path) -> None:
    module = Network()
    module.table = Resource(canary)
    save(module, folder, serving_default=function_of(lambda pixels: {"scores": module.logits(pixels)}))


def with_vocabulary(folder: Path, canary: Path) -> None:
    words = folder.with_suffix(".txt")
    words.write_text("a\nb\n")
    line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    start = tf.lookup.TextFileInitializer(str(words), tf.string, line, tf.int64, number)
    module = Network()
    module.table = tf.lookup.StaticHashTable(start, -1)

    def serve(images: Any) -> Any:
        return {"s": module.logits(images) + tf.cast(module.table.lookup(tf.constant("a")), tf.float32)}

    save(module, folder, serving_default=function_of(serve))


def with_custom_op(folder: Path, canary: Path) -> None:
    save_network(folder, tf.nn.relu)
    file = folder / "saved_model.pb"
    file.write_bytes(file.read_bytes().replace(b"Relu", b"Evil"))


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "py_function": (with_python, "operation EagerPyFunc .* reaches outside of the graph"),
    "numpy_function": (with_numpy, "operation PyFunc .* reaches outside"),
    "write_file": (with_write, "operation WriteFile .* reaches outside"),
    "write_file elsewhere": (with_write_elsewhere, "operation WriteFile .* reaches outside"),
    "read_file": (with_read, "operation ReadFile .* reaches outside"),
    "SaveV2": (with_save, "operation SaveV2 .* is none that can be converted"),
    "a resource": (with_resource, "a table or a file that is read while it is loaded. Received: resource"),
    "a vocabulary": (with_vocabulary, "is refused: it holds a table or a file"),
    "a custom op": (with_custom_op, "operation Evil .* is none that can be converted"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_saved_model_is_refused_and_nothing_is_run(case: str, tmp_path: Path) -> None:
    write, message = HOSTILE[case]
    canary = tmp_path / "canary"
    write(tmp_path / "m", canary)
    for path in tmp_path.glob("canary*"):
        path.unlink()  # made when it was built

    with pytest.raises(ConfigError, match=message):
        open_folder(tmp_path / "m", tmp_path / "scratch")
    assert not list(tmp_path.glob("canary*"))


@pytest.mark.parametrize("name", ["saved_model.pb", "variables", "variables/variables.data-00000-of-00001"])
def test_a_link_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    member = save_network(tmp_path / "m") / name
    member.rename(tmp_path / "elsewhere")
    member.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match=f"a link leads out of the folder.*Received: {name}$"):
        check_operations(tmp_path / "m")


def test_a_link_inside_of_the_folder_and_one_to_it_are_taken(tmp_path: Path) -> None:
    member = save_network(tmp_path / "m") / "saved_model.pb"
    member.rename(tmp_path / "m" / "first.pb")
    member.symlink_to("first.pb")
    (tmp_path / "link").symlink_to(tmp_path / "m")

    assert check_operations(tmp_path / "link") == "serving_default"


def test_a_harmless_model_passes_the_check(tmp_path: Path) -> None:
    assert check_operations(save_network(tmp_path / "m", key="classify")) == "classify"
