"""manifest: a row group for each shard, whatever there is to score."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import manifest_rows

from mnist_dist.scoring.manifest import (
    MAX_SHARD,
    MAX_SHARDS,
    MIN_SHARD,
    MIN_TINY_SHARD,
    SHARD,
    SHARD_BYTES,
    Manifest,
    choose_shard_size,
    shard_bounds,
    write_manifest,
)
from mnist_dist.sources.image_table import COLUMNS
from mnist_dist.sources.reading import TINY_BYTES
from mnist_dist.store.uris import join

Run = tuple[int, str | None, str | None]
"""How many rows side by side, of which archive, packed how."""


def rows_of(*runs: Run) -> pa.Table:
    archives = [archive for count, archive, _ in runs for _ in range(count)]
    packings = [packing for count, _, packing in runs for _ in range(count)]
    names = [f"image {index}" for index in range(len(archives))]
    return manifest_rows(names, archive=archives, packing=packings, size_bytes=range(len(names)))


def sizes(*runs: Run, shard_size: int) -> list[int]:
    bounds = shard_bounds(rows_of(*runs), shard_size=shard_size)
    return [end - start for start, end in itertools.pairwise(bounds)]


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path)
    return join(root, "work", "manifest.parquet")


def test_what_was_written_is_read_shard_by_shard(uri: str) -> None:
    table = rows_of((23, None, None))
    write_manifest(uri, table, shard_size=5)
    with Manifest(uri) as manifest:
        assert (manifest.shards, manifest.rows) == (5, 23)
        shards = [manifest.read(shard) for shard in range(manifest.shards)]
        assert [manifest.shard_rows(shard) for shard in range(manifest.shards)] == [len(rows) for rows in shards]
    assert [set(rows["shard"].to_pylist()) for rows in shards] == [{0}, {1}, {2}, {3}, {4}]
    assert pa.concat_tables(shards).drop_columns(["shard"]).equals(table)
    assert shards[0].schema.equals(COLUMNS.append(SHARD))


def test_carried_columns_go_along(uri: str) -> None:
    carried = pa.schema([("label", pa.int8()), pa.field("tags", pa.list_(pa.string()))])
    values = {"label": [3, None, 1], "tags": [["a", "b"], [], None]}
    table = rows_of((3, None, None))
    for field in carried:
        table = table.append_column(field, pa.array(values[field.name], field.type))
    write_manifest(uri, table, shard_size=2)
    with Manifest(uri) as manifest:
        assert manifest.carried.equals(carried)
        read = pa.concat_tables([manifest.read(0), manifest.read(1)])
    assert read.select(carried.names).to_pydict() == values
    assert read.column_names == [*COLUMNS.names, *carried.names, "shard"]


def test_a_column_that_an_older_file_lacks_is_empty(tmp_path: Path) -> None:
    uri = str(tmp_path / "manifest.parquet")
    write_manifest(uri, rows_of((3, None, None)), shard_size=2)
    older = pq.read_table(uri).drop_columns(["other_file", "address"])
    with pq.ParquetWriter(uri, older.schema) as writer:
        writer.write_table(older.slice(0, 2), row_group_size=2)
    with Manifest(uri) as manifest:
        rows = manifest.read(0)
    assert rows["uri"].to_pylist() == ["image 0", "image 1"]
    assert rows["other_file"].null_count == rows["address"].null_count == 2


def test_nothing_to_score_is_a_manifest_without_shards(uri: str) -> None:
    write_manifest(uri, COLUMNS.empty_table(), shard_size=5)
    with Manifest(uri) as manifest:
        assert (manifest.shards, manifest.rows, manifest.carried) == (0, 0, pa.schema([]))


def test_a_table_of_many_pieces_is_cut_at_the_same_rows(tmp_path: Path) -> None:
    table = pa.concat_tables([rows_of((4, None, None)), rows_of((3, "a.tgz", "stream")), rows_of((6, None, None))])
    assert table["uri"].num_chunks == 3
    write_manifest(str(tmp_path / "m"), table, shard_size=4)
    file = pq.ParquetFile(tmp_path / "m")
    assert [file.metadata.row_group(group).num_rows for group in range(4)] == [4, 3, 3, 3]


def test_threads_read_their_own_shards(uri: str) -> None:
    write_manifest(uri, rows_of((40, None, None)), shard_size=3)
    with Manifest(uri) as manifest, ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(manifest.read, range(manifest.shards)))
    assert [rows["shard"][0].as_py() for rows in shards] == list(range(14))
    assert sum(map(len, shards)) == 40


@pytest.mark.parametrize(
    ("rows", "shard_size", "expected"),
    [(23, 5, [4, 5, 4, 5, 5]), (20, 5, [5] * 4), (4, 5, [4]), (3, 1, [1] * 3), (1025, 1024, [512, 513])],
)
def test_shards_are_of_nearly_equal_size(rows: int, shard_size: int, expected: list[int]) -> None:
    assert sizes((rows, None, None), shard_size=shard_size) == expected


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(9, "a.tgz", "stream")], [9]),
        ([(5, None, None), (9, "a.tgz", "stream"), (3, None, None)], [2, 3, 9, 3]),
        ([(7, "a.tgz", "stream"), (6, "b.tgz", "stream"), (1, None, None)], [7, 6, 1]),
        ([(6, "a.tar", "tar"), (8, "b.zip", "deflated")], [3, 4, 3, 4]),  # read where they lie: cut like files
        ([(2, "a.tgz", "stream"), (2, "a.tgz", None)], [2, 2]),  # what is known of it without reading
    ],
)
def test_a_compressed_archive_is_one_shard(runs: Sequence[Run], expected: list[int]) -> None:
    assert sizes(*runs, shard_size=4) == expected


@pytest.mark.parametrize(
    ("rows", "total_bytes", "expected"),
    [
        (0, 0, MIN_SHARD),
        (100, 100, MIN_TINY_SHARD),
        (64 * 300, 64 * 300 * TINY_BYTES, MIN_TINY_SHARD),
        (64 * 300, 64 * 300 * TINY_BYTES + 1, 300),
        (64 * 1000, 0, 1000),  # 64 shards
        (64 * 1000, 64_000 * SHARD_BYTES // 300, 300),  # as many as the bytes allow
        (64 * 1000, 64_000 * SHARD_BYTES, MIN_SHARD),
        (1_000_000, 0, MAX_SHARD),
        (10_000_000, 0, MAX_SHARD),
        (10_000_000, 10**14, 1000),
        (100_000_001, 10**9, 10_001),
    ],
)
def test_a_shard_is_chosen_by_images_and_bytes(rows: int, total_bytes: int, expected: int) -> None:
    assert choose_shard_size(rows, total_bytes=total_bytes) == expected


@pytest.mark.parametrize("total_bytes", [0, 10**10, 10**14])
def test_ten_million_images_are_at_max_ten_thousand_shards(total_bytes: int) -> None:
    rows = 10_000_000
    size = choose_shard_size(rows, total_bytes=total_bytes)
    assert -(-rows // size) <= MAX_SHARDS
    assert MIN_SHARD <= size <= MAX_SHARD


def test_decoded_shards_can_be_kept_smaller() -> None:
    assert choose_shard_size(1_000_000, total_bytes=0, most=500) == 500
    assert choose_shard_size(1_000, total_bytes=0, most=90) == 90
    assert choose_shard_size(10_000_000, total_bytes=0, most=500) == 1000
