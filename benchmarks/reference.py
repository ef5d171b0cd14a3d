"""Compares the published reference systems with finished runs of their recipes here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mnist_dist.console import Console
from mnist_dist.errors import ConfigError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute


@dataclass(frozen=True, kw_only=True)
class ReferenceBenchmark:
    """Which runs to compare."""

    storage: str = "runs"
    """Folder or `s3://` prefix of finished training runs."""
    verbose: bool = False
    """Show the log."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSystem:
    """A published system and the recipe that reproduces it here."""

    what: str
    published: str
    recipe: str


REFERENCE_SYSTEMS = (
    ReferenceSystem(what="VGG16 at 224 px, frozen, dense softmax", published="near-perfect", recipe="mnist-vgg16"),
    ReferenceSystem(
        what="MobileNetV2 at 32 px, head, then fine-tuned", published="84.13 %, loss 0.56", recipe="mnist-mobilenet-v2"
    ),
    ReferenceSystem(what="the same, all layers trained", published="", recipe="mnist-mobilenet-v2-tuned"),
    ReferenceSystem(what="frozen convolutions, new head", published="over 99 %", recipe="mnist-conv-transfer"),
    ReferenceSystem(what="MLP 784-128-64-10", published="98.23 %", recipe="mnist-mlp"),
    ReferenceSystem(what="CNN, 421,642 parameters", published="99.07 %", recipe="mnist-cnn"),
    ReferenceSystem(
        what="CNN with BatchNorm, 459,210 parameters, EarlyStopping, ReduceLROnPlateau, best checkpoint",
        published="99.2 %, loss 0.03",
        recipe="mnist-cnn-bn",
    ),
)


def measure(benchmark: ReferenceBenchmark, *, console: Console) -> dict[str, Any]:
    """Finds the finished runs of each recipe.

    Raises:
        ConfigError: there are none.
    """
    results = _results(benchmark.storage)
    rows = [_row(system, results.get(system.recipe, [])) for system in REFERENCE_SYSTEMS]
    if not any(row["runs"] for row in rows):
        names = ", ".join(system.recipe for system in REFERENCE_SYSTEMS)
        raise ConfigError(f"no finished run of {names} there. Received: storage={benchmark.storage!r}")
    for row in rows:
        if not row["runs"]:
            console.line(f"no finished run of {row['recipe']}: {row['command']}")
    return {"storage": benchmark.storage, "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| system | backbone | published | here | loss | training images | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        here = "not run" if not row["runs"] else f"**{100 * row['accuracy']:.2f} %**"
        if row["runs"] > 1:
            here += f" ({100 * row['lowest']:.2f} to {100 * row['highest']:.2f}, {row['runs']} runs)"
        loss = f"{row['loss']:.3f}" if row["runs"] else ""
        images = f"{row['train_images']:,}" if row["runs"] else ""
        backbone = row.get("backbone", "")
        lines.append(
            f"| {row['what']} | {backbone} | {row['published']} | {here} | {loss} | {images} | `{row['command']}` |"
        )
    return "\n".join(lines)


def _results(uri: str) -> dict[str, list[dict[str, Any]]]:
    """Recipe -> results of its finished runs; only the runs that trained on the most images count."""
    root = absolute(uri)
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for entry in ANYWHERE.list_entries(root):
        path = entry.uri.removeprefix(f"{root}/")
        if path.count("/") != 1 or not path.endswith("/result.json"):
            continue
        result = json.loads(ANYWHERE.read_bytes(entry.uri))
        if "recipe" in result and result.get("test_accuracy") is not None:
            by_recipe.setdefault(result["recipe"], []).append(result)
    largest = {recipe: max(result["train_images"] for result in results) for recipe, results in by_recipe.items()}
    return {
        recipe: [result for result in results if result["train_images"] == largest[recipe]]
        for recipe, results in by_recipe.items()
    }


def _row(system: ReferenceSystem, results: list[dict[str, Any]]) -> dict[str, Any]:
    command = f"python -m jobs.train {system.recipe} --data-dir IDX_FOLDER"
    row: dict[str, Any] = {
        "what": system.what,
        "published": system.published,
        "recipe": system.recipe,
        "command": command,
    }
    row["runs"] = len(results)
    if results:
        accuracies = [result["test_accuracy"] for result in results]
        row["accuracy"] = sum(accuracies) / len(accuracies)
        row["lowest"], row["highest"] = min(accuracies), max(accuracies)
        row["loss"] = sum(result["test_loss"] for result in results) / len(results)
        row["train_images"] = max(result["train_images"] for result in results)
        row["backbone"] = results[0]["backbone"]
    return row
