import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mnist_dist.benchmarks.peers.task import Stamps, Task, read_stamps
from mnist_dist.benchmarks.photos import link_photos, write_photos, write_tar
from mnist_dist.benchmarks.programs import last_json, peak_memory_bytes, run_program, tree_memory_bytes
from mnist_dist.benchmarks.score import ScoreBenchmark, measure, steady_images_per_s, summary, table
from mnist_dist.console import Console
from mnist_dist.errors import ConfigError, MnistDistError

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
    rows = [{"model": "mobilenet_v2", "batch_size": 32, "peers": peers, "rounds": ROUNDS}]
    head = {"machine": "2 cores, Z80", "date": "2026-01-31", "images": 2_000, "image_kb": 67.9, "rows": rows}
    return {**head, **more}


def test_the_table_has_two_lines_for_each_model() -> None:
    assert table(result()) == (
        "| images/s | bare model | tf.data | ours |\n"
        "|---|---|---|---|\n"
        "| `mobilenet_v2`, steady (of bare) | 200.0 | 190.0 (0.95) | 198.0 (0.90) |\n"
        "| `mobilenet_v2`, whole run |  | 90.0 | 120.0 |\n"
        "\n"
        "2,000 JPEGs of about 68 KB; float32.\n"
        "2 cores, Z80, 2026-01-31"
    )


def test_the_table_tells_small_inputs_and_memory_in_a_line_each() -> None:
    small = {"model": "vgg16", "images": 10, "bare_s": 6.04, "ours_s": 9.06, "of_bare": 1.5}
    memory = {"model": "vgg16", "images": [2_000, 20_000], "peak_mb": [1_800.0, 1_890.0], "ratio": 1.05}
    lines = table(result(rows=[], small=small, memory=memory)).splitlines()
    assert lines[2] == "10 images with `vgg16`, start to exit: 9.1 s, bare script 6.0 s, ratio 1.50."
    assert lines[3] == (
        "Peak memory (PSS of all processes) with `vgg16`: 1,800 MB at 2,000 images, 1,890 MB at 20,000, ratio 1.05."
    )


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


@pytest.mark.slow
def test_a_benchmark_measures_scoring_with_its_peers() -> None:
    pytest.importorskip("skimage", reason="photographs come with scikit-image, of the extra `bench`")
    benchmark = ScoreBenchmark(models=("cnn",), images=8, rounds=1, peers=("bare", "tfdata"), seconds=0.2)
    measured = measure(benchmark, console=Console(terminal=False))
    (row,) = measured["rows"]
    assert row["peers"]["bare"]["steady"] > 0
    assert row["peers"]["tfdata"]["whole"] > 0
    assert row["peers"]["tfdata"]["of_bare"] == row["rounds"][0]["tfdata"]["steady"] / row["peers"]["bare"]["steady"]
    assert "| `cnn`, steady (of bare) |" in table(measured)
