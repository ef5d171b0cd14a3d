"""commit: exactly one row for each image, whichever steps a driver dies between."""

import contextlib
import datetime
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from harness import Watched
from scored import described_by, plan_of

from mnist_dist.config import FeatureType
from mnist_dist.errors import ConfigError, DataError, LockLost, MnistDistError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import TableConfig, TableFormat
from mnist_dist.scoring.commit import commit, rejudge, resume
from mnist_dist.scoring.generations import Committed, Generation, Output, Plan
from mnist_dist.scoring.manifest import write_manifest
from mnist_dist.scoring.parts import LISTED
from mnist_dist.scoring.predictions import STATUSES, Outcomes, prediction_rows, prediction_schema, read_predictions
from mnist_dist.sources.image_table import COLUMNS
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.memory import MemoryStore
from mnist_dist.store.uris import join

NOW = datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)
CLASSES = ("ant", "bee", "cat")
FEATURES = 5
CARRIED = pa.schema([("label", pa.int8())])
ALL = TableConfig(top_k=2)
OLD = tuple(f"a{index:02d}" for index in range(12))
SHARD_SIZE = 4
TINY = 1  # bytes of a part: each shard becomes one


class Died(Exception):
    """A driver is gone."""


# --- what a scoring job leaves to be committed -----------------------------------------------------------------------


def manifest_of(uris: tuple[str, ...]) -> pa.Table:
    values = {"uri": uris, "size_bytes": [len(uri) for uri in uris], "etag": [f"listed {uri}" for uri in uris]}
    columns = [pa.array(values[field.name], field.type) if field.name in values else None for field in COLUMNS]
    table = pa.table(
        [
            pa.nulls(len(uris), field.type) if column is None else column
            for field, column in zip(COLUMNS, columns, strict=True)
        ],
        schema=COLUMNS,
    )
    return table.append_column(CARRIED.field(0), pa.array(range(len(uris)), pa.int8()))


def schema_of(table: TableConfig) -> pa.Schema:
    return prediction_schema(table, carried=CARRIED, class_names=CLASSES, num_features=FEATURES)


def scored(planned: pa.Table, *, table: TableConfig, model_id: str) -> pa.Table:
    """The rows of a shard; each third image is missing, what the model said depends on its id."""
    count, uris = len(planned), planned["uri"].to_pylist()
    missing = [int(uri[1:]) % 3 == 2 for uri in uris]
    generator = np.random.default_rng(sum(map(ord, model_id)))
    outcomes = Outcomes(
        status=["missing" if gone else "ok" for gone in missing],
        error=["it is gone" if gone else None for gone in missing],
        width=np.full(count, 12, np.int32),
        height=np.full(count, 10, np.int32),
        size_bytes=[None if gone else 100 for gone in missing],
        etag=[None if gone else f"read {uri}" for gone, uri in zip(missing, uris, strict=True)],
        probabilities=generator.random((count, len(CLASSES)), np.float32),
        embeddings=generator.random((count, FEATURES), np.float32) if table.embeddings else None,
    )
    return prediction_rows(
        schema_of(table),
        uris=planned["uri"],
        outcomes=outcomes,
        class_names=CLASSES,
        top_k=table.top_k,
        thresholds=table.thresholds,
        model_id=model_id,
        scored_at=NOW,
        carried=planned.select(CARRIED.names),
    )


def put_shard(generation: Generation, shard: int, rows: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer)
    generation.store.write_bytes(generation.shard_uri(shard), buffer.getvalue().to_pybytes())


def begun_by(output: Output, plan: Plan, manifest: Callable[[str], None]) -> Generation:
    generation = output.new_generation(plan, fence=output.max_number() + 1)
    generation.begin(manifest)
    return generation


def put_generation(
    output: Output,
    uris: tuple[str, ...],
    *,
    model_id: str = "m",
    table: TableConfig = ALL,
    shard_size: int = SHARD_SIZE,
    keep_old: bool = True,
) -> Generation:
    """A generation all of whose shards are done."""
    plan = plan_of(model_id, keep_old=keep_old)
    generation = begun_by(
        output, plan, lambda uri: write_manifest(uri, manifest_of(uris), shard_size=shard_size, store=output.store)
    )
    for shard, planned in enumerate(shards_of(generation)):
        put_shard(generation, shard, scored(planned, table=table, model_id=model_id))
    return generation


def shards_of(generation: Generation) -> list[pa.Table]:
    """The manifest, shard by shard."""
    with pq.ParquetFile(pa.BufferReader(generation.store.read_bytes(generation.manifest_uri))) as file:
        return [file.read_row_group(shard) for shard in range(file.num_row_groups)]


def nothing(*_: object) -> None:
    """No check fails, no progress is shown, nobody dies."""


def commit_it(output: Output, generation: Generation, **other: Any) -> Committed:
    arguments: dict[str, Any] = {
        "fence": generation.number,
        "shards": len(shards_of(generation)),
        "schema": prediction_schema(ALL, carried=CARRIED),
        "judge": lambda counts, rows: True,
        "description": described_by(("ant", "bee")),
        "images_per_s": 1.5,
        "check": nothing,
        "progress": nothing,
        "part_bytes": TINY,
    }
    return commit(output, generation, **arguments | other)


@dataclass(frozen=True)
class Case:
    """A table that is there, and a generation that is to be published over it."""

    before: tuple[str, ...]
    uris: tuple[str, ...]
    keep_old: bool = True
    ok: bool = True
    was_ok: bool = True
    table_format: TableFormat = "parquet"

    def put(self, uri: str) -> None:
        output = Output(uri)
        if self.before:
            generation, judge = put_generation(output, self.before, model_id="old"), self.judge_by(self.was_ok)
            commit_it(output, generation, judge=judge, table_format=self.table_format)
        put_generation(output, self.uris, model_id="new", shard_size=2, keep_old=self.keep_old)

    def resume(
        self, uri: str, step: Callable[[str], None] = nothing, *, fence: int = 2, check: Callable[[], None] = nothing
    ) -> Committed:
        """What a driver with this number does that finds the output as it is."""
        output = Output(uri, store=Watched(step))
        judge = self.judge_by(self.ok)
        resumed = resume(
            output,
            fence=fence,
            is_mine=lambda generation: True,
            complete=lambda generation: commit_it(
                output, generation, fence=fence, judge=judge, check=check, table_format=self.table_format
            ),
            check=check,
        )
        committed = resumed or output.committed()
        assert committed is not None
        return committed

    @staticmethod
    def judge_by(ok: bool) -> Callable[[Mapping[str, int], int], bool]:
        return lambda counts, rows: ok


CASES = {
    "first": Case((), ("b00", "b01", "b02")),
    # of the three old files the first stays, of the second two rows do, and nothing of the third
    "retry": Case(OLD, ("a05", "a06", *OLD[8:], "b00"), was_ok=False),
    "increment": Case(OLD, ("b00", "b01", "b02"), ok=False),
    "fresh": Case(OLD, (*OLD[3:7], "b00"), keep_old=False),
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of each case, before the commit that is watched."""
    root = tmp_path_factory.mktemp("templates")
    for name, case in CASES.items():
        case.put(str(root / name))
    return {name: root / name for name in CASES}


@pytest.fixture(scope="module")
def finished(templates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Seen"]:
    """What each case comes to when nobody dies."""
    root = tmp_path_factory.mktemp("finished")
    for name, case in CASES.items():
        shutil.copytree(templates[name], root / name)
        case.resume(str(root / name))
    return {name: Seen.of(str(root / name)) for name in CASES}


@dataclass(frozen=True)
class Seen:
    """Everything that there is to be seen of an output, whichever driver decided on its newest version."""

    names: tuple[str, ...]
    mark: dict[str, Any]
    summary: dict[str, Any]
    rows: pa.Table
    listed: pa.Table

    @staticmethod
    def of(uri: str) -> "Seen":
        found = Output(uri).committed()
        assert found is not None
        number = found.mark.number

        def document(name: str) -> dict[str, Any]:
            data = json.loads(ANYWHERE.read_bytes(f"{uri}/{name}").decode().replace(f"{number:06d}", "newest"))
            assert data.pop("number") == number
            return dict(data)

        mark, summary = document(f"_tables/{number:06d}/mark.json"), document(f"_tables/{number:06d}/summary.json")
        assert document(found.mark.copy_name) == mark
        assert document("_summary.json") == summary
        return Seen(
            names=tuple(name.replace(f"{number:06d}", "newest") for name in names_in(uri)),
            mark=mark,
            summary=summary,
            rows=read_predictions(uri),
            listed=listed_in(uri),
        )


def names_in(uri: str) -> list[str]:
    return [entry.uri.removeprefix(f"{uri}/") for entry in ANYWHERE.list_entries(uri)]


def listed_in(uri: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(ANYWHERE.read_bytes(manifest_in(uri))))


def manifest_in(uri: str) -> str:
    """The manifest of the table."""
    (found,) = [name for name in names_in(uri) if re.fullmatch(r"_tables/\d+/manifest.parquet", name)]
    return join(uri, found)


def dying_at(count: int, die: Callable[[], object]) -> Callable[[str], None]:
    left = itertools.count(count, -1)

    def step(name: str) -> None:
        if next(left) == 0:
            die()

    return step


def raise_died() -> Never:
    raise Died


def steps_of(case: Case, uri: str) -> list[str]:
    steps: list[str] = []
    case.resume(uri, steps.append)
    return steps


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_there_is_exactly_one_row_for_each_image(finished: dict[str, Seen], name: str) -> None:
    case, seen = CASES[name], finished[name]
    kept = () if not case.keep_old else tuple(uri for uri in case.before if uri not in case.uris)
    assert seen.rows["uri"].to_pylist() == seen.listed["uri"].to_pylist()
    models = dict(zip(seen.rows["uri"].to_pylist(), seen.rows["model_id"].to_pylist(), strict=True))
    assert models == dict.fromkeys(kept, "old") | dict.fromkeys(case.uris, "new")
    assert len(seen.rows) == len(models)


@pytest.mark.parametrize(
    ("name", "files", "mark"),
    [
        ("first", ["part-newest-00000.parquet", "part-newest-00001.parquet"], "_SUCCESS"),
        (
            "retry",
            [
                "part-000001-00000.parquet",
                "part-newest-kept-00000.parquet",
                *(f"part-newest-0000{index}.parquet" for index in range(4)),
            ],
            "_SUCCESS",
        ),
        (
            "increment",
            [
                *(f"part-000001-0000{index}.parquet" for index in range(3)),
                *(f"part-newest-0000{index}.parquet" for index in range(2)),
            ],
            "_FAILED",
        ),
        ("fresh", [f"part-newest-0000{index}.parquet" for index in range(3)], "_SUCCESS"),
    ],
)
def test_only_files_with_rows_that_changed_are_written(
    finished: dict[str, Seen], name: str, files: list[str], mark: str
) -> None:
    assert finished[name].mark == {
        "files": files,
        "rows": len(finished[name].rows),
        "model_id": "new",
        "failed": mark == "_FAILED",
        "table_format": "parquet",
    }
    version = [f"_tables/newest/{file}" for file in ("manifest.parquet", "mark.json", "summary.json")]
    parts = [f"table/{file}" for file in files]
    assert sorted(finished[name].names) == sorted([*parts, *version, "_summary.json", mark])


def test_the_summary_counts_the_whole_table_and_shows_examples(finished: dict[str, Seen]) -> None:
    summary = finished["increment"].summary
    assert summary["statuses"] == dict.fromkeys(STATUSES, 0) | {"ok": 10, "missing": 5}
    assert summary["examples"] == {"missing": [{"uri": uri, "error": "it is gone"} for uri in ("a02", "a05", "a08")]}
    named = {name: summary[name] for name in ("rows", "model_id", "images_per_s")}
    assert named == {"rows": 15, "model_id": "new", "images_per_s": 1.5}
    assert summary["described"]["bundle"] == "models/b"
    assert summary["files"] == finished["increment"].mark["files"]


def test_each_file_of_the_table_describes_its_model(finished: dict[str, Seen]) -> None:
    assert json.loads(finished["first"].rows.schema.metadata[b"mnist_dist"]) == {
        "bundle": "models/b",
        "class_names": ["ant", "bee"],
        "resize": "crop",
        "spec": asdict(ImageSpec(height_px=10, width_px=12, channels=3, resize="crop")),
        "versions": {"python": "3.99"},
        "multi_label": False,
        "thresholds": {},
        "tta": [],
        "model_id": "new",
        "engine": "keras",
        "precision": "float32",
    }


def test_the_manifest_of_the_table_says_what_was_read_or_else_listed(finished: dict[str, Seen]) -> None:
    listed = finished["first"].listed
    assert listed.schema.equals(LISTED)
    listed_b02 = {"uri": "b02", "size_bytes": 3, "etag": "listed b02", "status": "missing"}
    assert listed.to_pylist() == [
        {"uri": "b00", "size_bytes": 100, "etag": "read b00", "status": "ok", "error": None, "other_file": None},
        {"uri": "b01", "size_bytes": 100, "etag": "read b01", "status": "ok", "error": None, "other_file": None},
        {**listed_b02, "error": "it is gone", "other_file": None},
    ]


def test_columns_that_the_table_leaves_out_are_those_of_the_listing(tmp_path: Path) -> None:
    table = TableConfig(columns=("confidence",))
    output = Output(str(tmp_path))
    generation = put_generation(output, ("b00", "b02"), table=table)
    commit_it(output, generation, schema=prediction_schema(table, carried=CARRIED))
    assert read_predictions(tmp_path).column_names == ["uri", "status", "confidence", "label"]
    assert listed_in(output.uri).to_pylist() == [
        {"uri": "b00", "size_bytes": 3, "etag": "listed b00", "status": "ok", "error": None, "other_file": None},
        {"uri": "b02", "size_bytes": 3, "etag": "listed b02", "status": "missing", "error": None, "other_file": None},
    ]
    again = put_generation(output, ("b00",), table=table)
    assert commit_it(output, again, schema=prediction_schema(table, carried=CARRIED)).mark.rows == 2


def drop_column(path: str, name: str) -> None:
    """Makes a manifest one of an older version, which lacks a column."""
    with pq.ParquetFile(pa.BufferReader(ANYWHERE.read_bytes(path))) as file:
        groups = [file.read_row_group(group).drop_columns([name]) for group in range(file.num_row_groups)]
    with ANYWHERE.new_object(path) as stream, pq.ParquetWriter(stream, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)


def test_a_generation_whose_manifest_lacks_a_column_is_finished(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    generation = put_generation(output, OLD)
    drop_column(generation.manifest_uri, "other_file")
    assert commit_it(output, generation).mark.rows == len(OLD)
    assert listed_in(output.uri).schema.equals(LISTED)


def test_a_table_whose_manifest_lacks_a_column_is_added_to(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    commit_it(output, put_generation(output, OLD))
    drop_column(manifest_in(output.uri), "other_file")
    assert commit_it(output, put_generation(output, (OLD[0], "z07"))).mark.rows == len(OLD) + 1
    assert listed_in(output.uri).schema.equals(LISTED)


def test_shards_become_files_of_the_size_asked_for(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    shown: list[tuple[int, int]] = []
    committed = commit_it(
        output,
        put_generation(output, OLD),
        part_bytes=2**20,
        progress=lambda done, total: shown.append((done, total)),
    )
    assert committed.mark.files == ("part-000001-00000.parquet",)
    assert pq.read_metadata(tmp_path / "table" / committed.mark.files[0]).num_row_groups == 1
    assert shown == [(1, 3), (2, 3), (3, 3)]


def rows_by_file(output: Output, committed: Committed) -> list[int]:
    return [pq.read_metadata(Path(output.uri) / "table" / name).num_rows for name in committed.mark.files]


@pytest.mark.parametrize(("part_rows", "rows"), [(12, [12]), (5, [5, 5, 2]), (4, [4, 4, 4]), (1, [1] * 12)])
def test_no_file_has_more_rows_than_asked_for(tmp_path: Path, part_rows: int, rows: list[int]) -> None:
    output = Output(str(tmp_path))
    committed = commit_it(output, put_generation(output, OLD), part_bytes=2**20, part_rows=part_rows)
    assert rows_by_file(output, committed) == rows
    assert read_predictions(tmp_path)["uri"].to_pylist() == list(OLD)
    listed = pq.ParquetFile(manifest_in(output.uri))
    assert [listed.metadata.row_group(group).num_rows for group in range(listed.num_row_groups)] == rows
    assert listed.read()["uri"].to_pylist() == list(OLD)


def test_a_group_that_a_file_cuts_goes_on_in_the_next_one(tmp_path: Path) -> None:
    """Each shard of 4 rows fills a file by its bytes, so that a limit of 3 rows cuts each of them."""
    output = Output(str(tmp_path))
    committed = commit_it(output, put_generation(output, OLD), part_bytes=TINY, part_rows=3)
    assert rows_by_file(output, committed) == [3, 1, 3, 1, 3, 1]
    assert read_predictions(tmp_path)["uri"].to_pylist() == list(OLD)


def test_another_number_of_rows_counts_for_the_files_that_a_generation_writes(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    commit_it(output, put_generation(output, OLD), part_bytes=2**20, part_rows=8)
    committed = commit_it(output, put_generation(output, ("a01", "b00", "b01")), part_bytes=2**20, part_rows=2)
    assert rows_by_file(output, committed) == [4, 2, 2, 2, 1, 2, 1]  # a file that is kept, seven old rows, three new
    assert sorted(read_predictions(tmp_path)["uri"].to_pylist()) == sorted([*OLD, "b00", "b01"])


def test_each_column_has_statistics_and_a_page_index(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    committed = commit_it(output, put_generation(output, OLD))
    for name in committed.mark.files:
        group = pq.read_metadata(tmp_path / "table" / name).row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        assert {column.compression for column in columns} == {"ZSTD"}
        assert all(column.is_stats_set and column.has_column_index and column.has_offset_index for column in columns)
    uri = pq.read_metadata(tmp_path / "table" / committed.mark.files[1]).row_group(0).column(0)
    assert (uri.statistics.min, uri.statistics.max) == ("a04", "a07")


@pytest.mark.slow
def test_a_large_shard_becomes_several_row_groups(tmp_path: Path) -> None:
    """A compressed archive is one shard, whatever its size."""
    output, rows, width = Output(str(tmp_path)), 100, 200_000  # 80 MB
    generation = put_generation(output, tuple(f"a{index:02d}" for index in range(rows)), shard_size=rows)
    planned = shards_of(generation)[0]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width, np.float32)), width)
    table = TableConfig(columns=("uri",), embeddings=True)
    schema = prediction_schema(table, carried=pa.schema([]), num_features=width)
    columns = [planned["uri"], pa.repeat("ok", rows), vectors]
    put_shard(generation, 0, pa.table(columns, schema=schema))
    committed = commit_it(output, generation, schema=schema, part_bytes=2**30)
    metadata = pq.read_metadata(tmp_path / "table" / committed.mark.files[0])
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [50, 50]
    assert read_predictions(tmp_path, columns=["uri"])["uri"].to_pylist() == planned["uri"].to_pylist()


def test_a_table_may_have_no_rows(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    committed = commit_it(output, put_generation(output, ()))
    assert (committed.mark.rows, len(committed.mark.files)) == (0, 1)
    assert read_predictions(tmp_path).schema.equals(prediction_schema(ALL, carried=CARRIED))
    assert commit_it(output, put_generation(output, ("b00",))).mark.rows == 1
    assert read_predictions(tmp_path)["uri"].to_pylist() == ["b00"]


@pytest.mark.parametrize("embedding_type", ["float32", "float16"])
def test_embeddings_and_wide_columns_keep_their_types_whatever_a_generation_holds(
    tmp_path: Path, embedding_type: FeatureType
) -> None:
    """No rows; only rows that are not ok; more rows, of which one replaces an old row, whose file is rewritten."""
    output = Output(str(tmp_path))
    table = TableConfig(wide=True, embeddings=True, embedding_type=embedding_type)
    schema = schema_of(table)
    for uris in ((), ("a02", "a05"), OLD[:2], ("a01", "a02", "b00")):
        commit_it(output, put_generation(output, uris, table=table), schema=schema, part_rows=3)
        assert all(pq.read_schema(path).equals(schema) for path in (tmp_path / "table").iterdir())
    rows = read_predictions(tmp_path)
    assert rows.schema.equals(schema)
    assert sorted(rows["uri"].to_pylist()) == ["a00", "a01", "a02", "a05", "b00"]
    missing = pc.not_equal(rows["status"], "ok")
    for name in ("embedding", *(f"probability_{name}" for name in CLASSES)):
        assert rows[name].is_null().equals(missing)
    for name, index in zip(CLASSES, range(3), strict=True):
        assert rows[f"probability_{name}"].equals(pc.list_element(rows["probabilities"], index))
    narrower = TableConfig(embeddings=True, embedding_type=embedding_type)
    generation = put_generation(output, ("b01",), table=narrower)
    with pytest.raises(ConfigError, match="columns must be the same as before"):
        commit_it(output, generation, schema=schema_of(narrower))


def test_a_table_is_made_in_any_store_that_is_given() -> None:
    store = MemoryStore()
    output = Output("memory://bucket/scores", store=store)
    commit_it(output, put_generation(output, ("b00", "b01", "b02")))
    commit_it(output, put_generation(output, ("b03",)))
    assert sorted(read_predictions(output.uri, store=store)["uri"].to_pylist()) == ["b00", "b01", "b02", "b03"]
    names = [entry.uri.rpartition("/")[2] for entry in store.list_entries(output.uri)]
    assert {"_SUCCESS", "mark.json", "manifest.parquet", "_summary.json"} < set(names)
    assert not any("_work" in entry.uri for entry in store.list_entries(output.uri))


# --- drivers that die ------------------------------------------------------------------------------------------------


def test_the_steps_are_in_the_order_in_which_they_can_be_repeated(templates: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(templates["retry"], tmp_path / "output")
    steps = steps_of(CASES["retry"], str(tmp_path / "output"))
    first, last = (steps.index(name) for name in ("delete _FAILED", "write summary.json"))
    steps[first + 1 : last] = sorted(steps[first + 1 : last])  # threads move the files
    parts = ["part-000002-kept-00000.parquet", *(f"part-000002-0000{index}.parquet" for index in range(4))]
    old = ["part-000001-00001.parquet", "part-000001-00002.parquet"]
    steps[last + 2 : last + 2 + len(old)] = sorted(steps[last + 2 : last + 2 + len(old)])
    assert steps == [
        "delete _SUCCESS",  # what the driver finds is swept first: the table is marked as failed
        "write manifest.parquet",
        *itertools.chain.from_iterable((f"write {part}", f"put {part}") for part in parts),
        "put manifest.parquet",
        "create commit.json",
        "delete _SUCCESS",
        "delete _FAILED",
        *sorted(["move manifest.parquet", *(f"move {part}" for part in parts)]),
        "write summary.json",
        "create mark.json",
        *sorted(f"delete {name}" for name in old),
        "delete all of 000001",
        "write _summary.json",
        "write _SUCCESS",
        "delete _FAILED",
        "delete plan.json",
        "delete all of g000002",
    ]


@pytest.mark.parametrize(
    "name", [name if name == "retry" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_driver_that_dies_between_any_two_steps_is_followed_by_one_that_finishes(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path, name: str
) -> None:
    shutil.copytree(templates[name], tmp_path / "counted")
    for count in range(len(steps_of(CASES[name], str(tmp_path / "counted")))):
        uri = str(tmp_path / str(count))
        shutil.copytree(templates[name], uri)
        with pytest.raises(Died):
            CASES[name].resume(uri, dying_at(count, raise_died))
        CASES[name].resume(uri, fence=3)
        assert Seen.of(uri) == finished[name], count


@pytest.mark.parametrize("name", CASES)
def test_drivers_that_die_again_and_again_come_to_an_end(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path, name: str
) -> None:
    shutil.copytree(templates[name], tmp_path / "output")
    uri, lives = str(tmp_path / "output"), random.Random(5)
    for fence in range(2, 100):
        try:
            CASES[name].resume(uri, dying_at(lives.randrange(25), raise_died), fence=fence)
            break
        except Died:
            pass
    assert Seen.of(uri) == finished[name]


@pytest.mark.parametrize("name", CASES)
def test_a_reader_sees_the_old_table_or_the_new_one(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path, name: str
) -> None:
    shutil.copytree(templates[name], tmp_path / "output")
    uri, seen, has_copy = str(tmp_path / "output"), list[str](), list[bool]()
    old = read_predictions(uri) if CASES[name].before else None

    def look(step: str) -> None:
        has_copy.append(bool({"_SUCCESS", "_FAILED"}.intersection(os.listdir(uri))))
        if old is None and not ANYWHERE.exists(f"{uri}/_tables/000002/mark.json"):
            with pytest.raises(DataError, match="is not finished"):
                read_predictions(uri)
            seen.append("none")
            return
        table = read_predictions(uri)
        assert table.equals(old) or table.equals(finished[name].rows)
        seen.append("new" if table.equals(finished[name].rows) else "old")
        if has_copy[-1]:  # who globs is right while there is a copy of the mark
            assert len(pq.read_table(tmp_path / "output" / "table", columns=["uri"])) == len(table)

    CASES[name].resume(uri, look)
    assert [kind for kind, _ in itertools.groupby(seen)] == ["old" if old else "none", "new"]
    assert [kind for kind, _ in itertools.groupby(has_copy)] == ([True, False, True] if old else [False, True])


def resume_as_another_job(output: Output, *, fence: int = 3, check: Callable[[], None] = nothing) -> Committed | None:
    return resume(
        output, fence=fence, is_mine=lambda generation: False, complete=lambda generation: raise_died(), check=check
    )


def test_the_generation_of_another_job_is_discarded(templates: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(templates["increment"], tmp_path / "output")
    output = Output(str(tmp_path / "output"))
    before = output.committed()
    assert resume_as_another_job(output) is None
    assert (output.committed(), output.unfinished()) == (before, None)
    assert not any(name.startswith("_work/") for name in names_in(output.uri))


def test_a_commit_that_was_begun_is_finished_by_another_job_too(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path
) -> None:
    shutil.copytree(templates["increment"], tmp_path / "output")
    uri = str(tmp_path / "output")
    with pytest.raises(Died):
        CASES["increment"].resume(uri, lambda name: raise_died() if name == "move manifest.parquet" else None)
    assert resume_as_another_job(Output(uri)) is None  # the table is not that job's
    assert Seen.of(uri) == finished["increment"]


def kill_in(name: str, uri: str, count: int) -> None:
    """Run by a process of its own."""
    CASES[name].resume(uri, dying_at(count, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def some_are_slow(counts: list[int], *, quick: set[int]) -> list[Any]:
    return [count if count in quick else pytest.param(count, marks=pytest.mark.slow) for count in counts]


@pytest.mark.parametrize("count", some_are_slow(sorted(random.Random(15).sample(range(27), 4)), quick={16}))
def test_a_driver_that_is_killed_is_followed_by_one_that_finishes(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path, count: int
) -> None:
    shutil.copytree(templates["retry"], tmp_path / "output")
    uri = str(tmp_path / "output")
    script = f"import test_commit; test_commit.kill_in('retry', {uri!r}, {count})"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=False)
    assert done.returncode == -signal.SIGKILL
    CASES["retry"].resume(uri, fence=3)
    assert Seen.of(uri) == finished["retry"]


@pytest.mark.parametrize("count", some_are_slow([1, 5, 13, 15, 17, 20, 22, 23, 24, 26], quick={13, 20}))
def test_the_same_on_s3(templates: dict[str, Path], finished: dict[str, Seen], s3: str, count: int) -> None:
    ANYWHERE.upload_folder(templates["retry"], s3)
    with pytest.raises(Died):
        CASES["retry"].resume(s3, dying_at(count, raise_died))
    CASES["retry"].resume(s3, fence=3)
    assert Seen.of(s3) == finished["retry"]


def test_a_move_on_s3_that_died_between_copy_and_delete_is_made_again(
    templates: dict[str, Path], finished: dict[str, Seen], s3: str
) -> None:
    ANYWHERE.upload_folder(templates["retry"], s3)
    name = "part-000002-00003.parquet"
    with pytest.raises(Died):
        CASES["retry"].resume(s3, lambda step: raise_died() if step == f"move {name}" else None)
    ANYWHERE.write_bytes(f"{s3}/table/{name}", ANYWHERE.read_bytes(f"{s3}/_work/g000002/out-000002/{name}"))
    CASES["retry"].resume(s3)
    assert Seen.of(s3) == finished["retry"]


def test_what_killed_writers_and_lost_work_left_goes_with_the_next_commit(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path
) -> None:
    shutil.copytree(templates["retry"], tmp_path / "output")
    for name in ("part-000001-00009.parquet", "part-000002-kept-00007.parquet"):
        (tmp_path / "output" / "table" / name).write_bytes(b"left")
    (tmp_path / "output" / "._SUCCESS.0123abcd.tmp").write_bytes(b"left")
    for name in ("_work/g000002/out-000001/part-000001-00009.parquet", "_tables/000000/manifest.parquet"):
        ANYWHERE.write_bytes(str(tmp_path / "output" / name), b"left")
    (tmp_path / "output" / "notes.txt").write_bytes(b"mine")
    CASES["retry"].resume(str(tmp_path / "output"))
    (tmp_path / "output" / "notes.txt").unlink()
    assert Seen.of(str(tmp_path / "output")) == finished["retry"]


def test_a_driver_that_lost_the_lock_stops_before_it_publishes(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path
) -> None:
    shutil.copytree(templates["fresh"], tmp_path / "output")
    output = Output(str(tmp_path / "output"))
    before = read_predictions(output.uri)
    for calls in itertools.count():
        left = itertools.count(calls, -1)

        def check(left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise LockLost("another driver has taken over")

        try:
            CASES["fresh"].resume(output.uri, fence=2 + calls, check=check)
            break
        except LockLost:
            now = read_predictions(output.uri)
            assert now.equals(before) or now.equals(finished["fresh"].rows)
    assert calls >= 3  # before the decision, the moves, the mark and the sweep, of which some come again
    assert Seen.of(output.uri) == finished["fresh"]


# --- drivers that are suspended and wake up late ---------------------------------------------------------------------


class Suspended:
    """A driver that is suspended before one of its steps, until another driver has done its work.

    Args:
        count: the number of the step.
        meanwhile: the work of the other driver.
    """

    def __init__(self, count: int, meanwhile: Callable[[], object]) -> None:
        self._left, self._meanwhile = itertools.count(count, -1), meanwhile
        self.was_suspended = False

    def step(self, name: str) -> None:
        if next(self._left) == 0:
            self._meanwhile()
            self.was_suspended = True

    def check(self) -> None:
        if self.was_suspended:
            raise LockLost("another driver has taken over")


def score_again(uri: str, fence: int, table_format: TableFormat = "parquet") -> None:
    """A third driver, which replaces the table: it scores `OLD` afresh, in other files."""
    output = Output(uri)
    output.sweep(fence=fence)
    generation = put_generation(output, OLD[:7], model_id="third", keep_old=False)
    commit_it(output, generation, fence=fence, table_format=table_format)


@pytest.mark.parametrize("then", ["finish", "replace"])
@pytest.mark.parametrize("name", CASES)
def test_a_driver_that_wakes_up_late_changes_nothing(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path, name: str, then: str
) -> None:
    def new_output(count: int) -> str:
        return str(shutil.copytree(templates[name], tmp_path / str(count)))

    assert_waking_up_late_changes_nothing(CASES[name], new_output, expected=finished[name], then=then)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["finish", pytest.param("replace", marks=pytest.mark.chaos)])
def test_a_driver_that_wakes_up_late_changes_nothing_on_s3(
    templates: dict[str, Path], finished: dict[str, Seen], s3: str, then: str
) -> None:
    def new_output(count: int) -> str:
        ANYWHERE.upload_folder(templates["retry"], f"{s3}/{count}")
        return f"{s3}/{count}"

    assert_waking_up_late_changes_nothing(CASES["retry"], new_output, expected=finished["retry"], then=then)


def test_a_driver_that_is_late_to_discard_deletes_nothing_of_its_successor(
    templates: dict[str, Path], finished: dict[str, Seen], tmp_path: Path
) -> None:
    """It is suspended at each of its steps; meanwhile another driver resumes what it is about to discard."""
    case = CASES["increment"]
    for count in itertools.count():
        uri = str(shutil.copytree(templates["increment"], tmp_path / str(count)))
        resumed: list[bool] = []

        def meanwhile(uri: str = uri, resumed: list[bool] = resumed) -> None:
            resumed.append(begins_to_resume(uri))

        late = Suspended(count, meanwhile)
        with contextlib.suppress(MnistDistError, OSError):
            resume_as_another_job(Output(uri, store=Watched(late.step)), fence=3, check=late.check)
        if not resumed:
            break
        if resumed == [True]:
            case.resume(uri, fence=4)
            assert Seen.of(uri) == finished["increment"], count
        else:  # it had been discarded for good
            assert Output(uri).unfinished() is None
    assert count > 1


def begins_to_resume(uri: str) -> bool:
    """A driver that takes over and resumes a generation, up to where it would score; whether there is one."""
    begun: list[Generation] = []

    def complete(generation: Generation) -> Never:
        begun.append(generation)
        raise Died

    with contextlib.suppress(Died):
        resume(Output(uri), fence=4, is_mine=lambda generation: True, complete=complete, check=nothing)
    return bool(begun)


def test_files_of_a_commit_whose_work_was_deleted_by_hand_go_with_the_next_command(
    templates: dict[str, Path], tmp_path: Path
) -> None:
    uri = str(shutil.copytree(templates["increment"], tmp_path / "output"))
    before = [name for name in names_in(uri) if name.startswith("table/")]
    with pytest.raises(Died):
        CASES["increment"].resume(uri, lambda step: raise_died() if step == "write summary.json" else None)
    assert len(names_in(f"{uri}/table")) == 5
    ANYWHERE.delete_tree(f"{uri}/_work")
    assert resume_as_another_job(Output(uri)) is None
    assert [name for name in names_in(uri) if name.startswith("table/")] == before


def assert_waking_up_late_changes_nothing(
    case: Case, new_output: Callable[[int], str], *, expected: Seen, then: str
) -> None:
    """Suspends a driver before each of its steps in turn."""
    for count in itertools.count():
        uri = new_output(count)

        def meanwhile(uri: str = uri) -> None:
            case.resume(uri, fence=3)
            if then == "replace":
                score_again(uri, fence=4)

        late, is_over = Suspended(count, meanwhile), False
        with contextlib.suppress(MnistDistError, OSError):  # as `locked_session` does, which raises LockLost instead
            case.resume(uri, late.step, check=late.check)
            is_over = not late.was_suspended
        if is_over:
            break
        rows = read_predictions(uri)
        if then == "replace":
            assert rows["uri"].to_pylist() == list(OLD[:7])
            assert set(rows["model_id"].to_pylist()) == {"third"}
            continue
        assert rows.equals(expected.rows), count
        case.resume(uri, fence=5)  # the next command
        assert Seen.of(uri) == expected, count
        assert sum(name.startswith("table/") for name in names_in(uri)) == len(expected.mark["files"])
    assert count > 15


def test_one_number_is_that_of_one_version(output: Output) -> None:
    generation = put_generation(output, ("b00",))
    with pytest.raises(MnistDistError, match="version 1 of the table is published, so version 1 cannot be"):
        commit_it(output, generation, fence=1)


def test_a_file_that_somebody_took_away_is_named(templates: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(templates["first"], tmp_path / "output")
    uri = str(tmp_path / "output")
    with pytest.raises(Died):
        CASES["first"].resume(uri, lambda name: raise_died() if name == "move manifest.parquet" else None)
    ANYWHERE.delete(f"{uri}/_work/g000001/out-000002/part-000002-00001.parquet")
    ANYWHERE.delete(f"{uri}/table/part-000002-00001.parquet")
    with pytest.raises(MnistDistError, match=r"is neither at .*/out-000002/part-000002-00001.parquet nor at"):
        CASES["first"].resume(uri)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    """A table of the images `OLD`, which must stay as it is."""
    output = Output(str(tmp_path / "output"))
    commit_it(output, put_generation(output, OLD))
    before = read_predictions(output.uri)
    yield output
    assert read_predictions(output.uri).equals(before)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.slice(1),
        lambda rows: rows.take([1, 0]),
        lambda rows: pa.concat_tables([rows, rows]),
        lambda rows: rows.drop_columns(["width"]),
    ],
)
def test_a_shard_that_is_not_that_of_the_manifest_is_refused(
    output: Output, spoil: Callable[[pa.Table], pa.Table]
) -> None:
    generation = put_generation(output, ("a01", "b01", "b02", "b03"), shard_size=2)
    put_shard(generation, 1, spoil(pq.read_table(generation.shard_uri(1))))
    with pytest.raises(MnistDistError, match=r"in their order; delete .*shard-000001.parquet and run .*expected 2 of"):
        commit_it(output, generation)


def test_a_shard_that_is_damaged_or_missing_is_refused(output: Output) -> None:
    generation = put_generation(output, ("a01", "b01"))
    ANYWHERE.write_bytes(generation.shard_uri(0), b"no table")
    with pytest.raises(MnistDistError, match=r"shard-000000.parquet is not readable; delete it and run"):
        commit_it(output, generation)
    ANYWHERE.delete(generation.shard_uri(0))
    with pytest.raises(MnistDistError, match=r"a shard that is to be published does not exist. Received: .*-000000"):
        commit_it(output, generation)
    with pytest.raises(MnistDistError, match=r"manifest.parquet has 1 shards, not 2"):
        commit_it(output, generation, shards=2)


def test_rows_of_a_table_without_a_column_that_is_a_default_now_stay_with_nulls(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    old = ("uri", "status", "error", "confidence", "size_bytes", "etag", "model_id", "scored_at", "label")
    columns = TableConfig(columns=old)
    generation = put_generation(output, OLD, model_id="old", table=columns)
    commit_it(output, generation, schema=prediction_schema(columns, carried=CARRIED))
    table = TableConfig()
    schema = prediction_schema(table, carried=CARRIED)
    before = read_predictions(output.uri)
    commit_it(output, put_generation(output, ("a05", "b00"), model_id="new", table=table), schema=schema)
    rows = read_predictions(output.uri)
    assert rows.schema.equals(schema)
    assert sorted(rows["uri"].to_pylist()) == sorted([*OLD, "b00"])
    kept = rows.filter(pc.equal(rows["model_id"], "old"))
    assert kept.select(before.column_names).equals(before.filter(pc.not_equal(before["uri"], "a05")))
    assert kept["width"].null_count == kept["probabilities"].null_count == len(kept) == 11
    assert all(
        pq.read_schema(Path(output.uri) / name).equals(schema) for name in names_in(output.uri) if "part-" in name
    )


def test_rows_of_other_columns_do_not_join_a_table(output: Output) -> None:
    table = TableConfig(columns=("width",))
    generation = put_generation(output, ("b00",), table=table)
    with pytest.raises(ConfigError, match=r"columns must be the same as before .*: uri, status, width, label"):
        commit_it(output, generation, schema=prediction_schema(table, carried=CARRIED))


def test_a_table_whose_own_manifest_is_of_another_is_not_added_to(output: Output, tmp_path: Path) -> None:
    path = Path(manifest_in(output.uri))
    data, generation = path.read_bytes(), put_generation(output, ("a01",))
    pq.write_table(pq.read_table(path), path)  # one row group
    with pytest.raises(DataError, match=r"the manifest is not that of the table; --mode fresh"):
        commit_it(output, generation)
    listed = pq.read_table(path)
    with pq.ParquetWriter(path, listed.schema) as writer:
        for start in (8, 4, 0):
            writer.write_table(listed.slice(start, 4))
    with pytest.raises(DataError, match=r"part-000001-00002.parquet and the manifest differ"):
        commit_it(output, generation)
    path.unlink()
    with pytest.raises(DataError, match=r"manifest.parquet cannot be read"):
        commit_it(output, generation)
    path.write_bytes(data)


# --- judging ---------------------------------------------------------------------------------------------------------


def test_a_table_is_judged_by_what_is_in_all_of_it(tmp_path: Path) -> None:
    output, asked = Output(str(tmp_path)), []

    def judge(counts: Mapping[str, int], rows: int) -> bool:
        asked.append((counts["ok"], counts["missing"], counts["denied"], rows))
        return counts["missing"] <= 2

    assert not commit_it(output, put_generation(output, ("b01", "b02")), judge=judge).mark.failed
    committed = commit_it(output, put_generation(output, ("b02", "b05", "b08")), judge=judge)
    assert committed.mark.failed
    assert asked == [(1, 1, 0, 2), (1, 3, 0, 4)]
    assert output.committed() == committed
    assert len(read_predictions(output.uri)) == 4


@pytest.mark.parametrize("root", ["local", "s3"])
def test_a_table_is_judged_anew_without_scoring(request: pytest.FixtureRequest, tmp_path: Path, root: str) -> None:
    output = Output(str(tmp_path) if root == "local" else request.getfixturevalue("s3"))
    good = commit_it(output, put_generation(output, ("b01", "b02")))
    bad = rejudge(output, good, fence=2, ok=False, check=nothing)
    assert bad.mark.failed
    assert output.committed() == bad
    assert {"_FAILED", "_SUCCESS"}.intersection(names_in(output.uri)) == {"_FAILED"}
    again = rejudge(output, bad, fence=3, ok=True, check=nothing)
    assert again == output.committed()
    assert replace(again.mark, number=1) == good.mark
    assert read_predictions(output.uri)["uri"].to_pylist() == listed_in(output.uri)["uri"].to_pylist()
    assert {"_FAILED", "_SUCCESS"}.intersection(names_in(output.uri)) == {"_SUCCESS"}


def test_copies_that_a_late_driver_spoiled_are_renewed(output: Output) -> None:
    committed, right = output.committed(), names_in(output.uri)
    ANYWHERE.move(f"{output.uri}/_SUCCESS", f"{output.uri}/_FAILED")
    ANYWHERE.write_bytes(f"{output.uri}/_summary.json", b"{}")
    assert output.committed() == committed
    output.sweep(fence=2)
    assert names_in(output.uri) == right
    assert json.loads(ANYWHERE.read_bytes(f"{output.uri}/_summary.json"))["rows"] == len(OLD)


# --- generations -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return Output(str(tmp_path / "new") if request.param == "local" else request.getfixturevalue("s3"))


def write_nothing(uri: str) -> None:
    ANYWHERE.write_bytes(uri, b"manifest")


def test_an_output_begins_with_nothing(empty: Output) -> None:
    assert empty.committed() is None
    assert empty.unfinished() is None
    assert empty.lock_uri == f"{empty.uri}/_work/lock"


def test_a_generation_is_found_again_with_its_plan_and_what_is_done(empty: Output) -> None:
    begun = begun_by(empty, plan_of(), write_nothing)
    assert begun == Generation(1, f"{empty.uri}/_work/g000001", plan_of())
    assert empty.unfinished() == begun
    for shard in (0, 7, 1_234_567):
        ANYWHERE.write_bytes(begun.shard_uri(shard), b"rows")
    ANYWHERE.write_bytes(f"{begun.uri}/shard-000008.scoring.begun", b"{}")
    assert begun.done_shards() == {0, 7, 1_234_567}
    assert begun.shard_uri(7).endswith("/g000001/shard-000007.parquet")
    assert not begun.is_committing


def test_a_generation_without_a_plan_was_never_begun(empty: Output) -> None:
    def die(uri: str) -> None:
        write_nothing(uri)
        raise Died

    with pytest.raises(Died):
        begun_by(empty, plan_of(), die)
    assert empty.unfinished() is None
    assert names_in(empty.uri) == ["_work/g000001/manifest.parquet"]
    empty.sweep(fence=1)  # a driver leaves its own number alone, and those of later ones, which are just beginning
    assert names_in(empty.uri) == ["_work/g000001/manifest.parquet"]
    begun_by(empty, plan_of(), write_nothing)
    empty.sweep(fence=2)
    assert names_in(empty.uri) == ["_work/g000002/manifest.parquet", "_work/g000002/plan.json"]


def test_work_whose_plan_is_damaged_names_the_folder_to_delete(empty: Output) -> None:
    begun = begun_by(empty, plan_of(), write_nothing)
    ANYWHERE.write_bytes(f"{begun.uri}/plan.json", b"{}")
    with pytest.raises(
        DataError, match=rf"plan\.json is not a Plan: .*; delete this unfinished .*: {re.escape(begun.uri)}"
    ):
        empty.unfinished()


def test_a_generation_that_is_discarded_leaves_the_table(output: Output) -> None:
    generation = put_generation(output, ("b00",))
    assert output.unfinished() == generation
    output.discard(generation, fence=2)
    assert output.unfinished() is None
    assert not any(name.startswith("_work/g") for name in names_in(output.uri))


def test_a_commit_that_was_begun_is_not_discarded(empty: Output) -> None:
    generation = begun_by(empty, plan_of(), write_nothing)
    ANYWHERE.write_bytes(generation.commit_uri, b"{}")
    with pytest.raises(MnistDistError, match="must be finished first"):
        empty.discard(generation, fence=2)


@pytest.mark.parametrize(
    "name",
    ["table/part-000004-kept-00000.parquet", "_tables/000004/summary.json", "_work/g000004/shard-000000.parquet"],
)
def test_the_highest_number_is_that_of_any_name(empty: Output, name: str) -> None:
    assert empty.max_number() == 0
    ANYWHERE.write_bytes(f"{empty.uri}/table/part-000003-00000.parquet", b"left")
    ANYWHERE.write_bytes(f"{empty.uri}/{name}", b"left")
    assert empty.max_number() == 4


def test_what_is_left_of_a_published_generation_is_debris(output: Output) -> None:
    left = Generation(1, f"{output.uri}/_work/g000001", plan_of())
    ANYWHERE.write_bytes(f"{left.uri}/plan.json", b"{}")
    ANYWHERE.write_bytes(left.commit_uri, b"{}")
    assert output.unfinished() is None
    output.sweep(fence=2)
    assert not any(name.startswith("_work/g") for name in names_in(output.uri))


def test_the_mark_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(DataError, match="is not the mark of a prediction table"):
        Output(str(tmp_path)).committed()
