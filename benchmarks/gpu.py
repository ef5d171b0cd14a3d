"""What `gpu.sh` runs: VGG16 and ResNet50 on this machine's GPU, ours on JAX beside PyTorch, and the feed.

In at most four minutes. Without a GPU the same runs on the CPU at small sizes, which only shows that it works.
"""

import json
import os
import shutil
import sys

from benchmarks import feed, model
from benchmarks.feed import FeedBenchmark
from benchmarks.model import ModelBenchmark
from mnist_dist.console import Console


def main() -> None:
    """Measures, prints the tables to stderr and one line of JSON to stdout."""
    console = Console(terminal=False)
    gpu = shutil.which("nvidia-smi") is not None
    sizes = {"size_px": 224, "precision": "bfloat16"} if gpu else {"size_px": 64, "precision": "float32"}
    infer_batch, train_batch = (256, 128) if gpu else (8, 4)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that peaks of memory mean something
    networks = ModelBenchmark(
        backbones=("vgg16", "resnet50"),
        backend=("jax", "torch"),
        infer_batch=infer_batch,
        train_batch=train_batch,
        quick=True,
        **sizes,  # type: ignore[arg-type]
    )
    of_networks = model.measure(networks, console=console)
    console.line(model.table(of_networks))
    feeding = FeedBenchmark(backbones=(), backend="jax", size_px=224, batch_size=infer_batch, quick=True)
    of_feed = feed.measure(feeding, console=console)
    rates = {row["backbone"]: row["images_per_s"] for row in of_networks["rows"] if _is_ours(row)}
    of_feed |= {"device": of_networks["device"], "backbones": feed.busy_of(rates, of_feed["feed"])}
    console.line(feed.table(of_feed))
    print(json.dumps({"job": "gpu", "gpu": gpu, "networks": of_networks, "feed": of_feed}))
    sys.exit(0 if of_networks["rows"] else 1)


def _is_ours(row: dict[str, object]) -> bool:
    return (row["work"], row["system"]) == ("infer", "jax")


if __name__ == "__main__":
    main()
