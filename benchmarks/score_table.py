"""Evaluates the scoring measurements: medians, ratios between peers, and tables of both.

Owns: the arithmetic and the Markdown. Does not own: the measurements (`score`).

Contract: figures are medians of the rounds, and a ratio is the median of the rounds' ratios, since machines are noisy.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnist_dist.engines.choice import OWN_NAMES

Figures = dict[str, float]
"""Images/s: `steady` and (except for parts of a job) `whole`; a summary also has `of_bare`."""
Round = dict[str, Figures]
"""Peer -> its figures."""

TITLES: dict[str, str] = {
    "bare": "bare model",
    "tfdata": "tf.data + `tf.function`",
    "predict": "tf.data + `predict`",
    "ray": "Ray's recipe",
    "daft": "Daft",
    "engine": "our engine alone",
    "engine-bf16": "our engine alone, bfloat16",
    "decode": "our decoding alone",
    "pixels": "our decoding alone, from memory",
    "ours": "ours",
    "ours-bf16": "ours, bfloat16",
    "ours-fast": "ours, fast decoding",
    "ours-exact": "ours, exact decoding",
    "ours-tar": "ours, from a tar",
    "ours-s3": "ours, from S3 on loopback",
}
# Decoding and engine take turns on the same cores: 1 / (1/engine + 1/decode).
ENGINE_AND_DECODE, ENGINE_AND_PIXELS = "engine+decode", "engine+pixels"
TITLES_OF_OTHERS: dict[str, str] = {
    **TITLES,
    "engine": "its engine on ready tensors",
    "engine-bf16": "its engine on ready tensors",
    ENGINE_AND_DECODE: "1 / (1/engine + 1/decode)",
    ENGINE_AND_PIXELS: "1 / (1/engine + 1/decode from memory)",
    "ours": "local files",
}
_PEERS = ("daft", "tfdata", "predict", "ray")
COMPARED: dict[str, tuple[str, ...]] = {
    "ours": (*_PEERS, "engine", ENGINE_AND_DECODE, ENGINE_AND_PIXELS),
    "ours-bf16": (*_PEERS, "engine-bf16"),
    "ours-fast": _PEERS,
    "ours-exact": (*_PEERS, "ours-fast"),
    "ours-tar": ("ours", ENGINE_AND_PIXELS),
    "ours-s3": ("ours",),
}
"""Our peer -> the peers to compare it with, if they were measured."""


# --- the arithmetic --------------------------------------------------------------------------------------------------


def summary(rounds: Sequence[Round], peer: str) -> Figures:
    """Medians of a peer's figures; `of_bare` is the median of the ratios to the same round's bare model."""
    figures = {name: statistics.median(found[peer][name] for found in rounds) for name in rounds[0][peer]}
    of_bare = ratio(rounds, peer, "bare", speed="steady")
    return figures if of_bare is None else {**figures, "of_bare": of_bare}


def ratio(rounds: Sequence[Round], peer: str, other: str, *, speed: str) -> float | None:
    """Median of the rounds' ratios between two peers' speeds; None if one of them was not measured."""
    return _median_ratio((_speed(found, peer, speed), _speed(found, other, speed)) for found in rounds)


def _median_ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return statistics.median(ratios) if ratios else None


def _speed(found: Round, peer: str, speed: str) -> float | None:
    if "+" not in peer:
        return found.get(peer, {}).get(speed)
    parts = [_speed(found, part, speed) for part in peer.split("+")]
    return None if None in parts else 1 / sum(1 / part for part in parts if part is not None)


def ratios(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """How many times as fast as other peers our job was with a model.

    Args:
        rounds: all rounds with that model.

    Returns:
        `ours` (a peer), `speed` (`steady` or `whole`) and `of`, the ratio to each other peer that was measured.
    """
    rows = []
    for ours, others in COMPARED.items():
        for speed in ("steady", "whole"):
            of = {other: ratio(rounds, ours, other, speed=speed) for other in others}
            measured = {other: value for other, value in of.items() if value is not None}
            rows += [{"ours": ours, "speed": speed, "of": measured}] if measured else []
    return rows


def beside_trained(rounds: Mapping[str, Sequence[Round]], twins: Mapping[str, str]) -> list[dict[str, Any]]:
    """How many times as fast as the same networks, trained here, imported models were with the same peer.

    Args:
        rounds: all rounds of each model.
        twins: imported model -> the same network trained here.

    Returns:
        `model`, `trained` (a model), `speed` (`steady` or `whole`) and `of`, the ratio with each peer of both.
    """
    rows = []
    for model, trained in twins.items():
        pairs = list(zip(rounds.get(model, ()), rounds.get(trained, ()), strict=False))
        for speed in ("steady", "whole"):
            of = {
                peer: _median_ratio((_speed(ours, peer, speed), _speed(theirs, peer, speed)) for ours, theirs in pairs)
                for peer in TITLES
            }
            measured = {peer: value for peer, value in of.items() if value is not None}
            rows += [{"model": model, "trained": trained, "speed": speed, "of": measured}] if measured else []
    return rows


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: two tables per model, then one line for each other figure."""
    blocks = [
        block
        for row in result["rows"]
        for block in (_model_table(row, cores=result["cores"]), _ratios_table(row))
        if block
    ]
    size = f"{result['image_kb']:.0f}" if result["image_kb"] >= 1 else f"{result['image_kb']:.1f}"
    lines = [f"{result['images']:,} {result['format']}s of about {size} KB; float32 where nothing else is said."]
    lines += [_prepared_line(model, prepared) for model, prepared in result["prepared"].items()]
    lines += [_trained_line(found) for found in result["beside_trained"]]
    lines += [_small_line(result["small"])] if "small" in result else []
    lines += [_memory_line(result["memory"])] if "memory" in result else []
    return "\n\n".join([*blocks, "\n".join([*lines, f"{result['machine']}, {result['date']}"])])


def _model_table(row: Mapping[str, Any], *, cores: int) -> str:
    title = f"`{row['model']}`, batches of {row['batch_size']}"
    lines = [
        f"| {title} | engine | steady, images/s | of bare | whole run, images/s "
        "| steady, per core | whole run, per core |",
        "|---" * 7 + "|",
    ]
    for peer, figures in row["peers"].items():
        share = f"{figures['of_bare']:.2f}" if peer not in ("bare", "decode") and "of_bare" in figures else ""
        steady, whole = figures["steady"], figures.get("whole")
        speeds = f"{_cell(steady)} | {share} | {_cell(whole)} | {_cell(steady, cores)} | {_cell(whole, cores)}"
        lines.append(f"| {TITLES[peer]} | {row['engines'].get(peer, '')} | {speeds} |")
    return "\n".join(lines)


def _ratios_table(row: Mapping[str, Any]) -> str:
    if not row["ratios"]:
        return ""
    lines = [f"| `{row['model']}` | times as fast as |", "|---|---|"]
    for found in row["ratios"]:
        of = "; ".join(f"{TITLES_OF_OTHERS[other]} {value:.2f}" for other, value in found["of"].items())
        lines.append(f"| {TITLES[found['ours']]}, {found['speed']} | {of} |")
    return "\n".join(lines)


def _cell(value: float | None, cores: int = 1) -> str:
    return "" if value is None else f"{value / cores:,.1f}"


def _prepared_line(model: str, prepared: Mapping[str, Any]) -> str:
    own = prepared["own_engine"]
    checks = "".join(_check(engine, OWN_NAMES[own]) for engine in prepared["engines"] if engine["engine"] != own)
    return f"`{model}`, conversion and check: {prepared['seconds']:.1f} s, once per bundle, in no other figure{checks}."


def _check(engine: Mapping[str, Any], own: str) -> str:
    facts = engine["engine_check"]
    images = f"{facts['images']:,} {facts['source']} images"
    return f"; {engine['engine']} {engine['precision']}: top class of {own} for {facts['agreement']:.1%} of {images}"


def _trained_line(found: Mapping[str, Any]) -> str:
    of = "; ".join(f"{TITLES[peer]} {value:.2f}" for peer, value in found["of"].items())
    return f"`{found['model']}`, imported, of `{found['trained']}`, trained here, {found['speed']}: {of}."


def _small_line(small: Mapping[str, Any]) -> str:
    return (
        f"{small['images']} images with `{small['model']}` ({small['engine']}), start to exit: "
        f"{small['ours_s']:.1f} s, bare script {small['bare_s']:.1f} s, ratio {small['of_bare']:.2f}."
    )


def _memory_line(memory: Mapping[str, Any]) -> str:
    (few, many), (less_mb, more_mb) = memory["images"], memory["peak_mb"]
    return (
        f"Peak memory (PSS of all processes) with `{memory['model']}` ({memory['engine']}): {less_mb:,.0f} MB at "
        f"{few:,} images, {more_mb:,.0f} MB at {many:,}, ratio {memory['ratio']:.2f}."
    )
