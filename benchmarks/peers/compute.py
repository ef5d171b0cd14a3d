"""One measurement of `benchmarks model`: a network's forward pass or training step on ready tensors.

Started as `python -m benchmarks.peers.compute ARGUMENT`, the argument a JSON object: `backbone`, `work` (infer, train),
`system` (tensorflow, jax, openvino, torch), `batch_size`, `size_px`, `precision` (float32, bfloat16), `seconds`. Prints
`{"images_per_s": ..., "compile_s": ..., "memory_bytes": ..., "flops_per_image": ..., "share_of_peak": ...,
"device": ...}` last. Calls are started one after the other and awaited together: a device is never idle for lack of
the next call.

FLOPs are those of convolutions and dense layers, two for each multiplication with its addition; a training step counts
as three forward passes, since the backward pass computes two products for each one of the forward pass.
"""

import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

NUM_CLASSES = 10
STEPS_PER_CALL = 2  # of a training step; the loop takes 1 to 20
PEAK_FLOPS: dict[str, float] = {
    # Dense bfloat16 on tensor cores, FLOP/s. Source: NVIDIA's data sheets of these products.
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
TORCH_MODELS: dict[str, str] = {
    # The backbones of the table, as timm calls them.
    "vgg16": "vgg16",
    "resnet50": "resnet50",
    "mobilenet": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "densenet121": "densenet121",
    "efficientnet_v2_b0": "tf_efficientnetv2_b0",
    "convnext_tiny": "convnext_tiny",
    "xception": "legacy_xception",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call that starts the work for `images` images and gives something to wait for, and how to wait for it."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    images: int
    device: str
    memory_bytes: Callable[[], int]


def main() -> None:
    """Measures and prints the result."""
    asked = json.loads(sys.argv[1])
    if asked["system"] in ("tensorflow", "jax"):
        os.environ["KERAS_BACKEND"] = asked["system"]
        prepared = prepare_training(asked) if asked["work"] == "train" else prepare_engine(asked)
    else:
        prepared = prepare_torch(asked) if asked["system"] == "torch" else prepare_openvino(asked)
    began = time.perf_counter()
    prepared.wait(prepared.start())
    compile_s = time.perf_counter() - began
    rate = prepared.images * calls_per_s(prepared, seconds=asked["seconds"])
    memory_bytes = prepared.memory_bytes()
    if asked["system"] in ("torch", "openvino"):
        use_keras_to_count()
    flops = flops_per_image(asked["backbone"], asked["size_px"]) * (3 if asked["work"] == "train" else 1)
    peak = peak_flops(prepared.device, asked["precision"])
    answer = {
        "images_per_s": rate,
        "compile_s": compile_s,
        "memory_bytes": memory_bytes,
        "flops_per_image": flops,
        "share_of_peak": None if peak is None else rate * flops / peak,
        "device": prepared.device,
    }
    print(json.dumps(answer))


def calls_per_s(prepared: Prepared, *, seconds: float) -> float:
    """Calls per second, after the one that compiles: of a single call where that takes as long, else of several."""
    began = time.perf_counter()
    prepared.wait(prepared.start())
    first_s = time.perf_counter() - began
    if first_s >= seconds:
        return 1 / first_s
    count = max(2, math.ceil(seconds / first_s))
    began = time.perf_counter()
    pending = [prepared.start() for _ in range(count)]
    prepared.wait(pending[-1])
    return count / (time.perf_counter() - began)


# --- ours ------------------------------------------------------------------------------------------------------------


def build(asked: dict[str, Any]) -> Any:
    """Our classifier with random weights."""
    from mnist_dist.config import ModelConfig
    from mnist_dist.models.classifier import build_classifier

    return build_classifier(
        ModelConfig(backbone=asked["backbone"], image_size_px=asked["size_px"]),
        spec=_spec(asked),
        num_classes=NUM_CLASSES,
        precision=asked["precision"],
    )


def prepare_engine(asked: dict[str, Any]) -> Prepared:
    """The `keras` engine of scoring, on a batch that lies on the device."""
    from mnist_dist.engines.engine import compile_model

    model = build(asked).model
    function = compile_model(model, batch_size=asked["batch_size"])
    batch = _on_device(_pixels(asked))
    return _of_keras(lambda: function(batch), images=asked["batch_size"])


def prepare_training(asked: dict[str, Any]) -> Prepared:
    """The training step, on a chunk that lies on the device."""
    from mnist_dist.config import OptimizerConfig
    from mnist_dist.data.batches import step_seeds
    from mnist_dist.models.classifier import set_trainable
    from mnist_dist.training.backends import open_computation
    from mnist_dist.training.feed import Examples, StepImages, TrainChunk, World
    from mnist_dist.training.step import StepConfig, Trained, make_optimizer

    computation = open_computation(World())
    with computation.scope():
        classifier = build(asked)
        set_trainable(classifier, "all")
        optimizer = make_optimizer(OptimizerConfig(), classifier.network.trainable_variables)
        config = StepConfig(batch_size=asked["batch_size"], class_weights=np.ones(NUM_CLASSES, np.float32))
        step = computation.train_step(Trained(network=classifier.network, optimizer=optimizer, config=config))
    pixels = _pixels(asked)
    shape = (STEPS_PER_CALL, asked["batch_size"])
    images = Examples(
        pixels=np.broadcast_to(pixels, (STEPS_PER_CALL, *pixels.shape)).copy(),
        labels=np.random.default_rng(0).integers(0, NUM_CLASSES, shape, dtype=np.int32),
        draws=np.zeros((*shape, 0), np.float32),
    )
    chunk = TrainChunk(images=StepImages(own=images), seeds=step_seeds(0, steps=range(STEPS_PER_CALL)))
    placed, rates = step.place(chunk, capacity=STEPS_PER_CALL), np.full(STEPS_PER_CALL, 1e-6, np.float32)
    return _of_keras(lambda: step(placed, rates=rates), images=STEPS_PER_CALL * asked["batch_size"])


def prepare_openvino(asked: dict[str, Any]) -> Prepared:
    """Our conversion for OpenVINO's runtime."""
    import openvino

    os.environ["KERAS_BACKEND"] = "tensorflow"
    model = build(asked).model
    pixels = _pixels(asked)
    model(pixels[:1], training=False)  # An export needs a called model.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        model.export(str(file), format="openvino", verbose=False)
        core = openvino.Core()
        graph = core.read_model(str(file))
        graph.reshape(list(pixels.shape))
        compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return Prepared(
        start=lambda: request.infer([pixels]),
        wait=lambda pending: pending,
        images=len(pixels),
        device=_processor(),
        memory_bytes=_peak_of_process,
    )


def _of_keras(start: Callable[[], Any], *, images: int) -> Prepared:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        device = jax.local_devices()[0]
        return Prepared(
            start=start,
            wait=jax.block_until_ready,
            images=images,
            device=_processor() if device.platform == "cpu" else device.device_kind,
            memory_bytes=lambda: int((device.memory_stats() or {}).get("peak_bytes_in_use", _peak_of_process())),
        )
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    return Prepared(
        start=start,
        wait=lambda outputs: [np.asarray(output) for output in outputs],
        images=images,
        device=str(details.get("device_name", "GPU")) if gpus else _processor(),
        memory_bytes=lambda: (
            int(tf.config.experimental.get_memory_info("GPU:0")["peak"]) if gpus else _peak_of_process()
        ),
    )


def _on_device(pixels: Any) -> Any:
    import keras

    return keras.ops.convert_to_tensor(pixels)


def _spec(asked: dict[str, Any]) -> Any:
    from mnist_dist.images.spec import ImageSpec

    return ImageSpec(height_px=asked["size_px"], width_px=asked["size_px"], channels=3)


def _pixels(asked: dict[str, Any]) -> Any:
    shape = (asked["batch_size"], asked["size_px"], asked["size_px"], 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def prepare_torch(asked: dict[str, Any]) -> Prepared:
    """The same network by timm: compiled, in channels_last, with autocast for bfloat16."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_float32_matmul_precision("high")
    network = _torch_network(asked["backbone"]).to(device, memory_format=torch.channels_last)
    pixels = torch.from_numpy(_pixels(asked)).to(device).permute(0, 3, 1, 2)
    images = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
    labels = torch.zeros(asked["batch_size"], dtype=torch.long, device=device)

    def cast() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=asked["precision"] == "bfloat16")

    if asked["work"] == "infer":
        network.eval()
        compiled = torch.compile(network)

        def start() -> Any:
            with torch.inference_mode(), cast():
                return compiled(images)

    else:
        network.train()
        compiled = torch.compile(network)
        optimizer = torch.optim.Adam(network.parameters(), 1e-6, fused=gpu)

        def start() -> Any:
            for _ in range(STEPS_PER_CALL):
                optimizer.zero_grad(set_to_none=True)
                with cast():
                    loss = torch.nn.functional.cross_entropy(compiled(images), labels)
                loss.backward()
                optimizer.step()
            return loss

    return Prepared(
        start=start,
        wait=lambda pending: torch.cuda.synchronize() if gpu else pending,
        images=asked["batch_size"] * (STEPS_PER_CALL if asked["work"] == "train" else 1),
        device=torch.cuda.get_device_name() if gpu else _processor(),
        memory_bytes=lambda: int(torch.cuda.max_memory_allocated()) if gpu else _peak_of_process(),
    )


def _torch_network(backbone: str) -> Any:
    """The network with our head: pooled features and one dense layer."""
    import timm
    import torch

    if backbone == "vgg16":  # timm's has dense layers of 4,096 before its head
        features = timm.create_model("vgg16", pretrained=False).features
        pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, NUM_CLASSES)]
        return torch.nn.Sequential(features, *pooled)
    return timm.create_model(TORCH_MODELS[backbone], pretrained=False, num_classes=NUM_CLASSES)


# --- FLOPs and memory ------------------------------------------------------------------------------------------------


def use_keras_to_count() -> None:
    """Chooses a backend of Keras, on the CPU, where the measurement needed none."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow" if find_spec("tensorflow") else "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def flops_per_image(backbone: str, size_px: int) -> float:
    """Of a forward pass: convolutions and dense layers; Keras builds the network."""
    classifier = build({"backbone": backbone, "size_px": size_px, "precision": "float32"})
    return sum(_flops(layer) for layer in (*_flat(classifier.backbone), *_flat(classifier.head)))


def _flat(model: Any) -> list[Any]:
    parts = [_flat(layer) if hasattr(layer, "layers") else [layer] for layer in model.layers]
    return [layer for part in parts for layer in part]


def _flops(layer: Any) -> float:
    """Two for each element of the output and each weight that contributes to it."""
    sizes = [math.prod(weight.shape) for weight in layer.weights if "kernel" in weight.name]
    positions = math.prod(layer.output.shape[1:-1])  # of a dense layer on a vector: 1
    return 2.0 * positions * float(sum(sizes)) if sizes else 0.0


def peak_flops(device: str, precision: str) -> float | None:
    """The peak of a GPU in bfloat16 by its name, FLOP/s. None: unknown, as on CPUs."""
    known = [peak for name, peak in PEAK_FLOPS.items() if name in device]
    return known[0] if known and precision == "bfloat16" else None


def _processor() -> str:
    from mnist_dist import processor

    return processor.described()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
