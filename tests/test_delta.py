"""The Delta table: one transaction for each version, whichever driver makes it, dies in it or comes to it late."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.schema import Field, PrimitiveType
from harness import ROOT
from test_commit import (
    CARRIED,
    CASES,
    OLD,
    Died,
    Suspended,
    commit_it,
    dying_at,
    put_generation,
    raise_died,
    score_again,
    steps_of,
)

from mnist_dist.errors import ConfigError, DataError, MnistDistError, StorageError
from mnist_dist.evaluation.tables import open_table
from mnist_dist.inventory import rows_below
from mnist_dist.score_config import TableConfig, TableFormat
from mnist_dist.scoring.commit import rejudge
from mnist_dist.scoring.delta import APPLICATION, DeltaLog, Part, check_output, delta_schema
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.output_row import table_row
from mnist_dist.scoring.predictions import FOLDERS, prediction_schema, read_predictions
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.memory import MemoryStore

DELTA = {name: replace(case, table_format="delta") for name, case in CASES.items()}


def table_of(uri: str) -> DeltaTable:
    url, options = ANYWHERE.object_store_access(f"{uri}/delta")
    return DeltaTable(url, storage_options=options)


def rows_in(uri: str) -> list[dict[str, Any]]:
    """The rows that a reader of Delta sees, by URI; there are no two of one."""
    rows = table_of(uri).to_pyarrow_table().to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return sorted(rows, key=lambda row: str(row["uri"]))


def assert_both_are_the_same(uri: str) -> list[dict[str, Any]]:
    """The log names the files that the mark names."""
    rows = sorted(read_predictions(uri).to_pylist(), key=lambda row: str(row["uri"]))
    assert rows_in(uri) == rows
    return rows


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of each case, before the commit that is watched."""
    root = tmp_path_factory.mktemp("templates")
    for name, case in DELTA.items():
        case.put(str(root / name))
    return {name: root / name for name in DELTA}


@pytest.fixture(scope="module")
def finished(templates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows that each case comes to when nobody dies."""
    root = tmp_path_factory.mktemp("finished")
    for name, case in DELTA.items():
        shutil.copytree(templates[name], root / name)
        case.resume(str(root / name))
    return {name: assert_both_are_the_same(str(root / name)) for name in DELTA}


@pytest.mark.parametrize("name", DELTA)
def test_each_version_of_the_table_is_one_transaction(templates: dict[str, Path], tmp_path: Path, name: str) -> None:
    case, uri = DELTA[name], str(tmp_path / "output")
    shutil.copytree(templates[name], uri)
    before = table_of(uri).version() if case.before else -1
    case.resume(uri)
    table = table_of(uri)
    assert (table.version(), table.transaction_version(APPLICATION)) == (before + 1, 2)
    kept = () if not case.keep_old else tuple(uri for uri in case.before if uri not in case.uris)
    models = {row["uri"]: row["model_id"] for row in assert_both_are_the_same(uri)}
    assert models == dict.fromkeys(kept, "old") | dict.fromkeys(case.uris, "new")
    assert not (tmp_path / "output" / "table").exists()


@pytest.mark.parametrize("name", ["retry", pytest.param("fresh", marks=pytest.mark.slow)])
def test_the_same_on_s3(
    templates: dict[str, Path], finished: dict[str, list[dict[str, Any]]], s3: str, name: str
) -> None:
    DELTA[name].put(s3)
    DELTA[name].resume(s3)
    assert assert_both_are_the_same(s3) == finished[name]
    assert table_of(s3).transaction_version(APPLICATION) == 2


@pytest.mark.parametrize("name", ["a b", "ä#b", "file://"])
def test_a_table_lies_wherever_its_output_may(tmp_path: Path, name: str) -> None:
    output = Output(f"file://{tmp_path}/output" if name == "file://" else f"{tmp_path}/{name}")
    for uris in (OLD, OLD[:5]):
        commit_it(output, put_generation(output, uris, keep_old=False), table_format="delta")
    assert len(assert_both_are_the_same(output.uri)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["output" if name == "file://" else name]


def test_polars_reads_it(templates: dict[str, Path], finished: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    shutil.copytree(templates["retry"], tmp_path / "output")
    DELTA["retry"].resume(str(tmp_path / "output"))
    found = polars.scan_delta(str(tmp_path / "output" / "delta")).sort("uri").collect()
    assert found["uri"].to_list() == [row["uri"] for row in finished["retry"]]
    assert found["top_k_classes"].to_list() == [row["top_k_classes"] for row in finished["retry"]]


def test_evaluation_and_listing_know_it(templates: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(templates["increment"], tmp_path / "scores" / "output")
    uri = str(tmp_path / "scores" / "output")
    DELTA["increment"].resume(uri)
    table = open_table(uri, bundle=None)
    assert (table.rows, table.failed, table.classes.names) == (15, True, ("ant", "bee"))
    (row,) = rows_below(str(tmp_path / "scores"), table_row)
    assert (row.state, row.result) == ("failed", "15 rows: 10 ok, 5 errors")


@pytest.mark.slow
def test_daft_reads_it(templates: dict[str, Path], finished: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    daft = pytest.importorskip("daft", reason="needs Daft; runs where the extra `bench` is installed")
    shutil.copytree(templates["retry"], tmp_path / "output")
    DELTA["retry"].resume(str(tmp_path / "output"))
    found = daft.read_deltalake(str(tmp_path / "output" / "delta")).sort("uri").to_pydict()
    assert found["uri"] == [row["uri"] for row in finished["retry"]]
    assert found["model_id"] == [row["model_id"] for row in finished["retry"]]


def test_the_log_knows_rows_and_limits_of_each_file(templates: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(templates["first"], tmp_path / "output")
    DELTA["first"].resume(str(tmp_path / "output"))
    log = (tmp_path / "output" / "delta" / "_delta_log" / "00000000000000000000.json").read_text().splitlines()
    adds = [entry["add"] for entry in map(json.loads, log) if "add" in entry]
    assert {add["path"]: json.loads(add["stats"]) for add in adds} == {
        "part-000002-00000.parquet": {"numRecords": 1, "minValues": {"uri": "b00"}, "maxValues": {"uri": "b00"}},
        "part-000002-00001.parquet": {"numRecords": 2, "minValues": {"uri": "b01"}, "maxValues": {"uri": "b02"}},
    }
    for add in adds:
        assert add["size"] == (tmp_path / "output" / "delta" / add["path"]).stat().st_size


def test_a_multi_label_table_is_read_like_any_other(tmp_path: Path) -> None:
    output, table = Output(str(tmp_path)), TableConfig(thresholds={"ant": 0.75, "bee": 0.5, "cat": 0.999})
    schema = delta_schema(prediction_schema(table, carried=CARRIED))
    generation = put_generation(output, OLD, table=table)
    commit_it(output, generation, schema=schema, table_format="delta")
    rows = assert_both_are_the_same(output.uri)
    assert {len(row["predicted_classes"]) for row in rows if row["status"] == "ok"} == {0, 1}
    assert all(row["predicted_classes"] is None for row in rows if row["status"] != "ok")
    found = polars.scan_delta(str(tmp_path / "delta")).sort("uri").collect()
    assert found["predicted_classes"].to_list() == [row["predicted_classes"] for row in rows]
    assert found["confidences"].to_list() == [row["confidences"] for row in rows]


def test_a_table_may_have_no_rows(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    commit_it(output, put_generation(output, ()), table_format="delta")
    assert assert_both_are_the_same(output.uri) == []
    commit_it(output, put_generation(output, ("b00",)), table_format="delta")
    assert len(assert_both_are_the_same(output.uri)) == 1


def test_a_fresh_table_may_have_other_columns(tmp_path: Path) -> None:
    output, table = Output(str(tmp_path)), TableConfig(columns=("confidence",))
    commit_it(output, put_generation(output, OLD), table_format="delta")
    generation = put_generation(output, OLD[:5], table=table, keep_old=False)
    commit_it(output, generation, schema=prediction_schema(table, carried=CARRIED), table_format="delta")
    rows = assert_both_are_the_same(output.uri)
    assert [set(row) for row in rows] == [{"uri", "status", "confidence", "label"}] * 5
    assert table_of(output.uri).version() == 1


def test_a_table_judged_anew_is_no_new_version_for_readers_of_delta(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    good = commit_it(output, put_generation(output, OLD), table_format="delta")
    rejudge(output, good, fence=2, ok=False, check=lambda: None)
    assert len(assert_both_are_the_same(output.uri)) == len(OLD)
    assert table_of(output.uri).version() == 0


# --- drivers that die or wake up late --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retry", *(pytest.param(name, marks=pytest.mark.slow) for name in DELTA)])
def test_a_driver_that_dies_between_any_two_steps_is_followed_by_one_that_finishes(
    templates: dict[str, Path], finished: dict[str, list[dict[str, Any]]], tmp_path: Path, name: str
) -> None:
    shutil.copytree(templates[name], tmp_path / "counted")
    for count in range(len(steps_of(DELTA[name], str(tmp_path / "counted")))):
        uri = str(tmp_path / str(count))
        shutil.copytree(templates[name], uri)
        with pytest.raises(Died):
            DELTA[name].resume(uri, dying_at(count, raise_died))
        DELTA[name].resume(uri, fence=3)
        assert assert_both_are_the_same(uri) == finished[name], count
        assert table_of(uri).version() == table_of(str(tmp_path / "counted")).version()


@pytest.mark.parametrize("then", ["finish", "replace"])
@pytest.mark.parametrize("name", ["retry", *(pytest.param(name, marks=pytest.mark.slow) for name in DELTA)])
def test_a_driver_that_wakes_up_late_changes_nothing(
    templates: dict[str, Path], finished: dict[str, list[dict[str, Any]]], tmp_path: Path, name: str, then: str
) -> None:
    for count in itertools.count():
        uri = str(tmp_path / str(count))
        shutil.copytree(templates[name], uri)

        def meanwhile(uri: str = uri) -> None:
            DELTA[name].resume(uri, fence=3)
            if then == "replace":
                score_again(uri, fence=4, table_format="delta")

        late, is_over = Suspended(count, meanwhile), False
        with contextlib.suppress(MnistDistError, OSError):
            DELTA[name].resume(uri, late.step, check=late.check)
            is_over = not late.was_suspended
        rows = assert_both_are_the_same(uri)
        if is_over:
            break
        expected = finished[name] if then == "finish" else [{"uri": uri, "model_id": "third"} for uri in OLD[:7]]
        assert [(row["uri"], row["model_id"]) for row in rows] == [(row["uri"], row["model_id"]) for row in expected]
    assert count > 15


class Interfering(DeltaLog):
    """A log in which something happens between loading the table and committing."""

    meanwhile: Callable[[], None] | None = None

    def _open(self) -> "DeltaTable | None":
        table = super()._open()
        happens, Interfering.meanwhile = Interfering.meanwhile, None
        if happens is not None:
            happens()
        return table


def part_in(folder: Path, name: str, uris: list[str]) -> Part:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"uri": uris}), folder / name)
    return Part(name=name, rows=len(uris), min_uri=min(uris), max_uri=max(uris))


@pytest.mark.parametrize("exists", [True, False])
def test_a_version_that_another_driver_published_meanwhile_is_not_published_again(tmp_path: Path, exists: bool) -> None:
    log, schema = Interfering(str(tmp_path), ANYWHERE), pa.schema([("uri", pa.string())])
    first, second = part_in(tmp_path, "a", ["a"]), part_in(tmp_path, "b", ["b"])
    if exists:
        log.publish([first], schema=schema, number=1)
    Interfering.meanwhile = lambda: DeltaLog(str(tmp_path), ANYWHERE).publish([second], schema=schema, number=2)
    log.publish([second], schema=schema, number=2)
    table = DeltaTable(str(tmp_path))
    assert (table.version(), table.transaction_version(APPLICATION)) == (int(exists), 2)
    assert table.to_pyarrow_table()["uri"].to_pylist() == ["b"]


def test_a_commit_of_somebody_else_in_between_is_waited_out(tmp_path: Path) -> None:
    log, schema = Interfering(str(tmp_path), ANYWHERE), pa.schema([("uri", pa.string())])
    log.publish([part_in(tmp_path, "a", ["a"]), part_in(tmp_path, "b", ["b"])], schema=schema, number=1)

    def compact() -> None:
        DeltaTable(str(tmp_path)).optimize.compact()

    Interfering.meanwhile = compact
    log.publish([part_in(tmp_path, "c", ["c"])], schema=schema, number=2)
    assert DeltaTable(str(tmp_path)).to_pyarrow_table()["uri"].to_pylist() == ["c"]


def test_a_version_older_than_the_newest_is_not_published(tmp_path: Path) -> None:
    log, schema = DeltaLog(str(tmp_path), ANYWHERE), pa.schema([("uri", pa.string())])
    log.publish([part_in(tmp_path, "b", ["b"])], schema=schema, number=2)
    with pytest.raises(DataError, match="version 2 of the Delta table is newer than what is to be published"):
        log.publish([part_in(tmp_path, "a", ["a"])], schema=schema, number=1)
    assert DeltaTable(str(tmp_path)).to_pyarrow_table()["uri"].to_pylist() == ["b"]


def test_a_file_that_another_program_deleted_is_named(tmp_path: Path) -> None:
    log, schema = DeltaLog(str(tmp_path), ANYWHERE), pa.schema([("uri", pa.string())])
    part = part_in(tmp_path, "a", ["a"])
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"a file of the Delta table is gone; .* Received: 'a' in"):
        log.publish([part], schema=schema, number=1)


@pytest.mark.parametrize("age_h", [2, 0])
def test_vacuum_deletes_files_that_were_replaced_long_enough_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_h: int
) -> None:
    now = time.time_ns()
    monkeypatch.setattr("mnist_dist.scoring.delta.time.time_ns", lambda: now - age_h * 3600 * 10**9)
    output = Output(str(tmp_path))
    for model in ("one", "two"):
        generation = put_generation(output, OLD, model_id=model, keep_old=False)
        commit_it(output, generation, table_format="delta")
    found = output.committed()
    assert found is not None
    assert DeltaLog(f"{output.uri}/delta", ANYWHERE).vacuum(found.mark.files, hours=1) == (3 if age_h else 0)
    assert {row["model_id"] for row in assert_both_are_the_same(output.uri)} == {"two"}
    assert len(list((tmp_path / "delta").glob("part-000001-*"))) == (0 if age_h else 3)


# --- other programs --------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """A Delta table of the images `OLD`, in three files."""
    output = Output(str(tmp_path / "output"))
    commit_it(output, put_generation(output, OLD), table_format="delta")
    return output


def test_a_column_that_another_program_added_costs_no_row(output: Output) -> None:
    field = Field("note", PrimitiveType("string"))
    table_of(output.uri).alter.add_columns([field])
    commit_it(output, put_generation(output, ("b00",)), table_format="delta")
    assert {row["uri"] for row in rows_in(output.uri)} == {*OLD, "b00"}


def test_a_table_that_another_program_optimized_is_ours_again_with_the_next_version(output: Output) -> None:
    table_of(output.uri).optimize.compact()
    commit_it(output, put_generation(output, ("b00",)), table_format="delta")
    assert {row["uri"] for row in assert_both_are_the_same(output.uri)} == {*OLD, "b00"}


def test_nothing_is_vacuumed_that_the_mark_names(output: Output) -> None:
    table_of(output.uri).optimize.compact()
    found = output.committed()
    assert found is not None
    assert DeltaLog(f"{output.uri}/delta", ANYWHERE).vacuum(found.mark.files, hours=0) is None
    assert len(read_predictions(output.uri)) == len(OLD)


def test_files_that_another_program_vacuumed_are_missed_before_anything_is_decided(output: Output) -> None:
    (Path(output.uri) / "delta" / "part-000001-00001.parquet").unlink()
    generation = put_generation(output, ("b00",))
    with pytest.raises(DataError, match=r"files of the table are gone; --mode fresh .* Received: 'part-000001-00001"):
        commit_it(output, generation, table_format="delta")
    assert not generation.is_committing


@pytest.mark.parametrize(
    ("table_format", "name"), [("delta", "part-000001-00000.parquet"), ("parquet", "theirs.parquet")]
)
def test_a_folder_with_the_files_of_another_program_is_refused(
    tmp_path: Path, table_format: TableFormat, name: str
) -> None:
    output = Output(str(tmp_path))
    output.check_nothing_else(table_format)
    ANYWHERE.write_bytes(f"{tmp_path}/{FOLDERS[table_format]}/{name}", b"theirs")
    with pytest.raises(DataError, match=f"must be empty before the first run; .* Received: '{FOLDERS[table_format]}/"):
        output.check_nothing_else(table_format)


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.uint8(), pa.int16()),
        (pa.uint32(), pa.int64()),
        (pa.list_(pa.float32(), 4), pa.list_(pa.field("element", pa.float32()))),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.timestamp("ns", tz="Europe/Berlin"), pa.timestamp("us", tz="UTC")),
        (pa.struct([pa.field("a", pa.int8(), metadata={"PARQUET:field_id": "3"})]), pa.struct([("a", pa.int8())])),
        (pa.struct([("a", pa.uint8())]), pa.struct([("a", pa.int16())])),
    ],
)
def test_columns_get_types_that_delta_has(kind: pa.DataType, expected: pa.DataType) -> None:
    assert delta_schema(pa.schema([("x", kind)])).field("x").type == expected


@pytest.mark.parametrize(
    "kind",
    [
        pa.uint64(),
        pa.float16(),
        pa.time64("us"),
        pa.duration("s"),
        pa.list_(pa.float16()),
        pa.timestamp("us"),
        pa.decimal256(50, 2),
        pa.uuid(),
    ],
)
def test_columns_that_delta_does_not_have_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(ConfigError, match=r"no type for the column 'x'; leave it out, or use --table-format parquet"):
        delta_schema(pa.schema([("x", kind)]))


@pytest.mark.parametrize("name", ["probability_a bee", "a=b", "a,b"])
def test_names_that_readers_of_delta_refuse_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="names of a Delta table's columns have no space"):
        delta_schema(pa.schema([(name, pa.string())]))


def test_float16_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="a Delta table has no float16"):
        TableConfig(table_format="delta", embeddings=True, embedding_type="float16")


def test_carried_values_come_back_as_they_were(tmp_path: Path) -> None:
    """`label` is int8 in the shards; an unsigned byte above 127 must not wrap around."""
    schema = pa.schema([("uri", pa.string()), ("shade", pa.uint8())])
    rows = pa.table({"uri": ["a"], "shade": pa.array([200], pa.uint8())}).cast(delta_schema(schema))
    pq.write_table(rows, tmp_path / "a")
    part = Part(name="a", rows=1, min_uri="a", max_uri="a")
    DeltaLog(str(tmp_path), ANYWHERE).publish([part], schema=rows.schema, number=1)
    assert DeltaTable(str(tmp_path)).to_pyarrow_table()["shade"].to_pylist() == [200]


def test_an_output_that_cannot_hold_a_delta_table_is_refused() -> None:
    with pytest.raises(StorageError, match="a Delta table cannot be kept in this store"):
        check_output("memory://bucket/delta", MemoryStore())
    with pytest.raises(ConfigError, match="must not have one of %"):
        check_output("/outputs/a%20b", ANYWHERE)


def test_without_deltalake_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"pip install 'mnist_dist\[delta\]'"):
        check_output("/outputs/a", ANYWHERE)


# --- a reader beside the commits -------------------------------------------------------------------------------------

READS, VERSIONS = 1_000, 10  # It reads on until it has seen so many of both, however slow the writer is.
WRITER = """
import itertools, sys
from test_commit import commit_it, put_generation
from mnist_dist.scoring.generations import Output
output = Output(sys.argv[1])
for version in itertools.count(1):
    uris = tuple(f"a{index:02d}" for index in range(version % 9 + 1))
    generation = put_generation(output, uris, model_id=f"{version}", keep_old=False)
    commit_it(output, generation, fence=generation.number, table_format="delta")
    print(version, flush=True)
"""


@pytest.mark.slow
def test_a_reader_beside_the_commits_sees_whole_versions_only(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()  # the first version is there
        try:
            seen, reads = set[str](), 0
            while reads < READS or len(seen) < VERSIONS:
                reads += 1
                rows = rows_in(str(tmp_path))
                (model,) = {row["model_id"] for row in rows}
                assert len(rows) == int(model) % 9 + 1
                seen.add(model)
        finally:
            writer.kill()
