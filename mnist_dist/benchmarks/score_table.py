"""What the measurements of scoring come to: medians, ratios beside what was aimed at, and the tables of both.

Owns: the arithmetic, the aims, the Markdown. Does not own: the measurements (`score`).

Contract: figures are medians of the rounds, and a ratio is the median of the rounds' ratios, since machines are noisy.
An aim is shown where everything that it compares was measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Figures = dict[str, float]
"""Images/s, `steady` and (but for parts of a job) `whole`; in a summary also `of_bare`."""
Round = dict[str, Figures]
"""By peer."""

TITLES: dict[str, str] = {
    "bare": "bare model",
    "tfdata": "tf.data + `tf.function`",
    "predict": "tf.data + `predict`",
    "ray": "Ray's recipe",
    "daft": "Daft",
    "engine": "our engine alone",
    "engine-bf16": "our engine alone, bfloat16",
    "decode": "our decoding alone",
    "ours": "ours",
    "ours-bf16": "ours, bfloat16",
    "ours-tar": "ours, from a tar",
    "ours-s3": "ours, from S3 on loopback",
}
ENGINE_AND_DECODE = "engine+decode"  # both on the same cores, one after the other: 1 / (1/engine + 1/decode)
TITLES_OF_OTHERS: dict[str, str] = {
    **TITLES,
    "engine": "its engine on ready tensors, same cores",
    ENGINE_AND_DECODE: "1 / (1/engine + 1/decode)",
    "ours": "local files",
}
MOST_MEMORY, MOST_START = 1.15, 1.3


@dataclass(frozen=True, kw_only=True)
class Aim:
    """How many times as fast as others one of ours has to be."""

    figure: str
    """With `{engine}`, that of ours, and `{images}`."""
    model: str | None = None
    """None: any."""
    ours: str
    speed: Literal["steady", "whole"] = "steady"
    least: Mapping[str, float]
    """By peer."""


def _four(*least: float) -> dict[str, float]:
    return dict(zip(("daft", "tfdata", "predict", "ray"), least, strict=True))


_MOBILENET = "mobilenet_v2"
_DEFAULT, _BFLOAT16 = "MobileNetV2, default engine ({engine})", "MobileNetV2, bfloat16 ({engine})"
_RUN = "whole run of {images:,} images"
AIMS: tuple[Aim, ...] = (
    Aim(figure="VGG16: the job at steady state", model="vgg16", ours="ours", least={"engine": 0.95}),
    Aim(figure="MobileNetV2: the job at steady state", model=_MOBILENET, ours="ours", least={ENGINE_AND_DECODE: 0.95}),
    Aim(figure=f"{_DEFAULT}, steady", model=_MOBILENET, ours="ours", least=_four(1.7, 1.7, 1.9, 2.0)),
    Aim(figure=f"{_BFLOAT16}, steady", model=_MOBILENET, ours="ours-bf16", least=_four(2.6, 2.6, 2.9, 3.1)),
    Aim(figure=f"{_DEFAULT}, {_RUN}", model=_MOBILENET, ours="ours", speed="whole", least=_four(1.3, 1.2, 1.2, 2.0)),
    Aim(
        figure=f"{_BFLOAT16}, {_RUN}",
        model=_MOBILENET,
        ours="ours-bf16",
        speed="whole",
        least=_four(1.5, 1.4, 1.4, 2.4),
    ),
    Aim(figure="VGG16, bfloat16 ({engine}), steady", model="vgg16", ours="ours-bf16", least=_four(1.7, 1.7, 1.7, 1.7)),
    Aim(figure="`{model}` from a tar, steady", ours="ours-tar", least={"ours": 0.95}),
    Aim(figure="`{model}` from S3 on loopback, steady", ours="ours-s3", least={"ours": 0.8}),
)


# --- the arithmetic --------------------------------------------------------------------------------------------------


def summary(rounds: Sequence[Round], peer: str) -> Figures:
    """Medians of a peer's figures; `of_bare`, the median of the rounds' ratios to that round's bare model."""
    figures = {name: statistics.median(found[peer][name] for found in rounds) for name in rounds[0][peer]}
    of_bare = ratio(rounds, peer, "bare", speed="steady")
    return figures if of_bare is None else {**figures, "of_bare": of_bare}


def ratio(rounds: Sequence[Round], peer: str, other: str, *, speed: str) -> float | None:
    """Median of the rounds' ratios of a peer's speed to another's; None where one of the two was not measured."""
    pairs = [(_speed(found, peer, speed), _speed(found, other, speed)) for found in rounds]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return statistics.median(ratios) if ratios else None


def _speed(found: Round, peer: str, speed: str) -> float | None:
    if peer != ENGINE_AND_DECODE:
        return found.get(peer, {}).get(speed)
    parts = [_speed(found, part, speed) for part in ("engine", "decode")]
    return None if None in parts else 1 / sum(1 / part for part in parts if part is not None)


def aims(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and what was found.

    Args:
        result: of `score.measure`, without this.

    Returns:
        For each aim of which something was measured `figure`, and as lists of the same length `asked` and `found`;
        `bound`, `least` or `most`, says on which side.
    """
    rows = [_aim_row(aim, row, images=result["images"]) for aim in AIMS for row in result["rows"]]
    found = [row for row in rows if row["found"]]
    if "memory" in result:
        less, more = result["memory"]["images"]
        figure = f"peak memory (PSS of driver and workers) at {more:,} images vs {less:,}"
        found.append(_at_most(figure, MOST_MEMORY, result["memory"]["ratio"]))
    if "small" in result:
        small = result["small"]
        figure = (
            f"{small['images']} images ({small['engine']}), start to exit, vs a bare `ray.init`, model and one batch"
        )
        found.append(_at_most(figure, MOST_START, small["of_bare"]))
    return found


def _aim_row(aim: Aim, row: Mapping[str, Any], *, images: int) -> dict[str, Any]:
    """Of a model's measurements; without anything found where it is about another model."""
    found: dict[str, float] = {}
    for other in aim.least if aim.model in (None, row["model"]) else ():
        value = ratio(row["rounds"], aim.ours, other, speed=aim.speed)
        if value is not None:
            found[other] = value
    figure = aim.figure.format(engine=row["engines"].get(aim.ours, "none"), images=images, model=row["model"])
    return {
        "figure": f"{figure}, vs {'; '.join(TITLES_OF_OTHERS[other] for other in found)}",
        "bound": "least",
        "asked": [aim.least[other] for other in found],
        "found": list(found.values()),
    }


def _at_most(figure: str, asked: float, found: float) -> dict[str, Any]:
    return {"figure": figure, "bound": "most", "asked": [asked], "found": [found]}


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a table for each model, one of the aims, and a line for each of the rest."""
    blocks = [_model_table(row) for row in result["rows"]]
    blocks += [_aims_table(result["aims"])] if result["aims"] else []
    lines = [f"{result['images']:,} JPEGs of about {result['image_kb']:.0f} KB; float32 where nothing else is said."]
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


def _aims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| figure | asked | found |", "|---|---|---|"]
    for row in rows:
        asked = "; ".join(f"{value:.4g}" for value in row["asked"]) + (" at most" if row["bound"] == "most" else "")
        lines.append(f"| {row['figure']} | {asked} | {'; '.join(f'{value:.2f}' for value in row['found'])} |")
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
    (some, many), (less_mb, more_mb) = memory["images"], memory["peak_mb"]
    return (
        f"Peak memory (PSS of all processes) with `{memory['model']}` ({memory['engine']}): {less_mb:,.0f} MB at "
        f"{some:,} images, {more_mb:,.0f} MB at {many:,}, ratio {memory['ratio']:.2f}."
    )
