"""Evaluates the scoring measurements: medians, ratios between peers, and tables of both.

Owns: the arithmetic and the Markdown. Does not own: the measurements (`score`).

Contract: figures are medians of the rounds, and a ratio is the median of the rounds' ratios, since machines are noisy.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
    pairs = [(_speed(found, peer, speed), _speed(found, other, speed)) for found in rounds]
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


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: two tables per model, then one line for each other figure."""
    blocks = [block for row in result["rows"] for block in (_model_table(row), _ratios_table(row)) if block]
    size = f"{result['image_kb']:.0f}" if result["image_kb"] >= 1 else f"{result['image_kb']:.1f}"
    lines = [f"{result['images']:,} {result['format']}s of about {size} KB; float32 where nothing else is said."]
    lines += [_prepared_line(model, prepared) for model, prepared in result["prepared"].items()]
    lines += [_small_line(result["small"])] if "small" in result else []
    lines += [_memory_line(result["memory"])] if "memory" in result else []
    return "\n\n".join([*blocks, "\n".join([*lines, f"{result['machine']}, {result['date']}"])])


def _model_table(row: Mapping[str, Any]) -> str:
    title = f"`{row['model']}`, batches of {row['batch_size']}"
    lines = [f"| {title} | engine | steady, images/s | of bare | whole run, images/s |", "|---" * 5 + "|"]
    for peer, figures in row["peers"].items():
        share = f"{figures['of_bare']:.2f}" if peer not in ("bare", "decode") and "of_bare" in figures else ""
        speeds = f"{_cell(figures['steady'])} | {share} | {_cell(figures.get('whole'))}"
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


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _prepared_line(model: str, prepared: Mapping[str, Any]) -> str:
    checks = "".join(_check(engine) for engine in prepared["engines"] if engine["engine"] != "keras")
    return f"`{model}`, conversion and check: {prepared['seconds']:.1f} s, once per bundle, in no other figure{checks}."


def _check(engine: Mapping[str, Any]) -> str:
    facts = engine["engine_check"]
    images = f"{facts['images']:,} {facts['source']} images"
    return f"; {engine['engine']} {engine['precision']}: top class of Keras for {facts['agreement']:.1%} of {images}"


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
