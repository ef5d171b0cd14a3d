"""cache: rows computed once, whoever asks, wherever they are stored."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from mnist_dist.data import cache as data_cache
from mnist_dist.data.cache import MAX_SHARDS, Cache, ShardRows, column_of
from mnist_dist.errors import DataError, ServiceError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

ROWS, SHARD_ROWS, WIDTH = 20, 7, 3  # shards of 7, 7 and 6
DESCRIPTION = ImageSpec(height_px=5, width_px=7, channels=3)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "runs")


def planned(place: str | Path, key: str = "a" * 64) -> Cache:
    return Cache(what="numbers", storage=str(place), key=key, rows=ROWS, min_shard_rows=SHARD_ROWS)


def numbers(rows: int = ROWS) -> npt.NDArray[np.int16]:
    """Each row has its own number, `WIDTH` times."""
    return np.repeat(np.arange(rows, dtype=np.int16)[:, None], WIDTH, axis=1)


def put(cache: Cache, *shards: int) -> None:
    for shard in shards:
        cache.put(shard, pa.table({"number": column_of(numbers()[cache.rows_of(shard)])}))


def filled(cache: Cache) -> Cache:
    put(cache, *cache.missing())
    cache.finish(DESCRIPTION)
    return cache


def values(cache: Cache, local_dir: Path) -> npt.NDArray[Any]:
    return np.concatenate(cache.on_node(local_dir).values("number"))


def names(uri: str) -> list[str]:
    return sorted(entry.uri.removeprefix(f"{uri}/") for entry in ANYWHERE.list_entries(uri))


def test_shards_are_put_in_any_order_and_opened_as_rows(place: str, tmp_path: Path) -> None:
    cache = planned(place)
    assert cache.root == join(place, "_numbers", "a" * 16)
    assert (cache.shards, cache.missing(), cache.is_finished()) == (3, [0, 1, 2], False)
    put(cache, 1)
    ANYWHERE.write_bytes(f"{cache.root}/shard-000002.decoding.begun", b"a process is at it")
    assert cache.missing() == [0, 2]
    filled(cache)
    assert (cache.missing(), cache.is_finished()) == ([], True)
    np.testing.assert_array_equal(values(cache, tmp_path / "node"), numbers())


def test_a_cache_is_plain_and_crosses_processes(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(planned(tmp_path))) == planned(tmp_path)


@pytest.mark.parametrize("rows", [5_000_000, MAX_SHARDS * SHARD_ROWS + 1])
def test_there_are_no_more_shards_than_a_process_can_map(rows: int) -> None:
    cache = replace(planned("runs"), rows=rows)
    sizes = [len(range(rows)[cache.rows_of(shard)]) for shard in range(cache.shards)]
    assert cache.shards <= MAX_SHARDS
    assert sum(sizes) == rows
    assert min(sizes) > 0


def test_the_mark_says_what_the_rows_are(tmp_path: Path) -> None:
    cache = filled(planned(tmp_path))
    mark = json.loads((Path(cache.root) / "numbers.json").read_text())
    assert mark["key"] == cache.key
    assert mark["description"]["width_px"] == 7


def test_finishing_twice_is_harmless(tmp_path: Path) -> None:
    cache = filled(planned(tmp_path))
    mark = Path(cache.root) / "numbers.json"
    before = mark.stat().st_mtime_ns
    cache.finish(DESCRIPTION)
    assert mark.stat().st_mtime_ns == before


def test_missing_shards_cannot_be_finished(place: str) -> None:
    cache = planned(place)
    put(cache, 1)
    with pytest.raises(ServiceError, match=rf"{re.escape(cache.root)}: 2 of 3 shards are missing: \[0, 2\]"):
        cache.finish(DESCRIPTION)
    assert not cache.is_finished()


def test_an_unfinished_cache_cannot_be_opened_until_it_is_finished(place: str, tmp_path: Path) -> None:
    cache = planned(place)
    put(cache, 0)
    with pytest.raises(DataError, match=rf"no finished numbers\. Received: .*{re.escape(cache.root)}"):
        values(cache, tmp_path / "node")
    assert len(values(filled(cache), tmp_path / "node")) == ROWS


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def write_other(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_other_column(path: Path) -> None:
    write_other(path, pa.table({"other": [1.0] * SHARD_ROWS}))


def leave_out_a_row(path: Path) -> None:
    write_other(path, pa.table({"number": column_of(numbers(SHARD_ROWS - 1))}))


def add_a_row(path: Path) -> None:
    write_other(path, pa.table({"number": column_of(numbers(SHARD_ROWS + 1))}))


@pytest.mark.parametrize(
    "damage",
    [halve, cut_last_byte, empty, fill_with_zeros, Path.unlink, write_other_column, leave_out_a_row, add_a_row],
)
def test_a_damaged_shard_is_refused_with_the_folder_to_delete(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cache = filled(planned(tmp_path))
    damage(Path(cache.root) / "shard-000001.arrow")
    with pytest.raises(DataError, match=rf"^{re.escape(cache.root)}: .*delete the folder"):
        values(cache, tmp_path)


@pytest.mark.parametrize("mark", [b"", b"{}", b'{"key": 7, "description": null, "made": ""}'])
def test_a_damaged_mark_is_refused_with_the_folder_to_delete(tmp_path: Path, mark: bytes) -> None:
    cache = filled(planned(tmp_path))
    (Path(cache.root) / "numbers.json").write_bytes(mark)
    with pytest.raises(DataError, match=rf"^{re.escape(cache.root)}/numbers\.json .*delete the folder"):
        values(cache, tmp_path)


def test_the_rows_of_another_key_are_refused(place: str, tmp_path: Path) -> None:
    other = filled(planned(place, key="a" * 16 + "b"))
    cache = planned(place)
    assert cache.root == other.root
    with pytest.raises(DataError, match=rf"numbers of {cache.key}\. Received: {other.key}; delete the folder"):
        values(cache, tmp_path / "node")


def test_what_lies_on_s3_is_downloaded_once_for_a_node(s3: str, tmp_path: Path) -> None:
    cache, node = filled(planned(s3)), tmp_path / "node"
    ANYWHERE.write_bytes(f"{cache.root}/shard-000002.decoding.begun", b"a process is at it")
    values(cache, node)
    copies = sorted((node / "_numbers" / cache.key[:16]).iterdir())
    assert [copy.name for copy in copies] == [
        "lock", "numbers.json", *(f"shard-00000{shard}.arrow" for shard in range(3))
    ]  # fmt: skip
    written = [copy.stat().st_mtime_ns for copy in copies[1:]]
    values(cache, node)
    assert [copy.stat().st_mtime_ns for copy in copies[1:]] == written


def test_a_download_that_was_killed_is_made_again(s3: str, tmp_path: Path) -> None:
    cache = filled(planned(s3))
    copy = tmp_path / "_numbers" / cache.key[:16]
    copy.mkdir(parents=True)
    (copy / "shard-000000.arrow").write_bytes(b"half")
    (copy / ".shard-000001.arrow.1234.tmp").write_bytes(b"half")
    np.testing.assert_array_equal(values(cache, tmp_path), numbers())
    assert not list(copy.glob(".*"))


def test_a_cache_that_was_made_again_replaces_the_copy_of_a_node(s3: str, tmp_path: Path) -> None:
    cache = filled(planned(s3))
    values(cache, tmp_path)
    ANYWHERE.delete_tree(cache.root)  # some rows could not be read, say
    for shard in range(cache.shards):
        cache.put(shard, pa.table({"number": column_of(-numbers()[cache.rows_of(shard)])}))
    cache.finish(DESCRIPTION)
    np.testing.assert_array_equal(values(cache, tmp_path), -numbers())


def test_what_failed_runs_left_is_cleared_away_at_the_end(place: str) -> None:
    cache = planned(place)
    for name in ("shard-000001.decoding.begun", "shard-000001.abcdef.error"):
        ANYWHERE.write_bytes(f"{cache.root}/{name}", b"of a process that died")
    filled(cache)
    assert names(cache.root) == ["numbers.json", *(f"shard-00000{shard}.arrow" for shard in range(3))]


def shard_rows(*sizes: int) -> ShardRows:
    ends = np.cumsum(sizes)
    return ShardRows([numbers()[end - size : end] for end, size in zip(ends, sizes, strict=True)])


@pytest.mark.parametrize("sizes", [(20,), (7, 7, 6), (1,) * 20], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [np.int64(15), 0, np.array([19]), np.arange(20), np.array([[13, 0], [14, 6]]), np.zeros((2, 0), np.int64)],
    ids=str,
)
@pytest.mark.parametrize("large_row_bytes", [0, 10**6])
def test_rows_are_gathered_in_the_shape_of_their_numbers(
    sizes: tuple[int, ...], wanted: Any, large_row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "_LARGE_ROW_BYTES", large_row_bytes)
    rows = shard_rows(*sizes)
    assert rows.shape == (20, WIDTH)
    np.testing.assert_array_equal(rows[wanted], numbers()[wanted])
    assert rows[wanted].dtype == np.int16


@pytest.mark.parametrize(("sizes", "row"), [((20,), 20), ((7, 7, 6), 20), ((7, 7, 6), 21), ((7, 7, 6), -1)])
@pytest.mark.parametrize("large_row_bytes", [0, 10**6])
def test_a_row_that_is_not_there_is_refused(
    sizes: tuple[int, ...], row: int, large_row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "_LARGE_ROW_BYTES", large_row_bytes)
    with pytest.raises(IndexError, match=r"out of (bounds|range)"):
        shard_rows(*sizes)[np.array([3, row])]
