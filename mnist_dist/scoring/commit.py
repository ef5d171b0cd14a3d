"""How finished shards become the prediction table: generations of work, published in steps that can be repeated.

Owns: the folder `_work`, which generation is unfinished, and the order in which the table changes. Does not own: what
is in a row (`predictions`), what is scored (`manifest`), or the lock, which whoever changes anything here holds.

```
<output>/
  part-g0002-00000.parquet ...   the table: rows of generation 2, or left of older ones (part-g0002-kept-00000.parquet)
  _manifest.parquet              uri, size_bytes, etag, status, error of every row; a row group for each file, in order
  _summary.json  _SUCCESS        (or _FAILED)
  _work/lock
  _work/g0003/                   a generation: one first run, increment, retry or fresh start
    manifest.parquet  plan.json  what is to be scored, and how; plan.json last: it completes the generation
    shard-000007.begun           somebody is at work on the shard
    shard-000007.parquet         the shard is done
    out/  commit.json            what is to be published; from commit.json on the commit happens, whoever dies
```

A generation whose number is not above that of the mark is published: what is left of it is debris. Any driver that dies
leaves either the old table, or a `commit.json` from which the next one goes on (`replay`).
"""

import collections
import contextlib
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist import storage
from mnist_dist.errors import ConfigError, DataError, MnistDistError
from mnist_dist.scoring.predictions import (
    FAILED,
    LOCK,
    STATUSES,
    SUCCESS,
    WORK,
    Mark,
    read_mark,
    read_row_groups,
    table_schema,
)

PART_BYTES = 128 * 2**20  # few enough files of 10 million rows, and small enough to be read in parallel
PART_ROWS = 1_000_000  # of a file: what `_manifest.parquet` says of it is in memory at once
ROW_GROUP_BYTES = 32 * 2**20  # in memory: about as many narrow rows as the readers' units of work
EXAMPLES = 3  # of each status, in the summary
THREADS = 8  # that read ahead, and move files: on object stores a request waits far longer than it works
MANIFEST, SUMMARY = "_manifest.parquet", "_summary.json"
LISTED = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
    ]
)
"""The columns of `_manifest.parquet`; size and etag are those of the listing where reading has not told them."""

_SOURCE_COLUMNS = ("uri", "size_bytes", "etag")
_GENERATION = re.compile(rf"{WORK}/g(\d+)/(.*)")
_SHARD = re.compile(r"shard-(\d+)\.parquet")
_PART = re.compile(r"part-g(\d+)-(?:kept-)?\d+\.parquet")
_LEFT_BY_KILLED = re.compile(rf"\.({SUCCESS}|{FAILED}|{re.escape(SUMMARY)})\.[0-9a-f]+\.tmp")

Step = Callable[[str], None]
"""Called with the name of each single change of the storage before it is made; a test's way to die there."""


def _go_on(name: str) -> None:
    """The step that nobody watches."""


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A complete table."""

    generation: int
    files: tuple[str, ...]
    """Names in the output, in the order of the rows."""
    rows: int
    model_id: str
    failed: bool
    """It was judged to hold too many bad rows."""
    summary: dict[str, Any]
    """What `_summary.json` says."""


@dataclass(frozen=True)
class Generation:
    """One stretch of work, by the URI of its folder."""

    number: int
    uri: str
    plan: dict[str, Any]
    """Written once, when it began; `model_id` is in it."""

    @property
    def manifest_uri(self) -> str:
        return storage.join(self.uri, "manifest.parquet")

    @property
    def out_uri(self) -> str:
        return storage.join(self.uri, "out")

    @property
    def commit_uri(self) -> str:
        return storage.join(self.uri, "commit.json")

    @property
    def is_committing(self) -> bool:
        """Whether its commit was begun, which then must be brought to its end (`replay`)."""
        return storage.exists(self.commit_uri)

    def shard_uri(self, shard: int) -> str:
        return storage.join(self.uri, f"shard-{shard:06d}.parquet")

    def begun_uri(self, shard: int) -> str:
        """Of the JSON object that says who is at work on the shard."""
        return storage.join(self.uri, f"shard-{shard:06d}.begun")

    def done_shards(self) -> set[int]:
        """The shards that are there, by one listing."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in storage.scan_entries(self.uri))
        return {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}


class Output:
    """The folder of a prediction table. Whoever calls what writes holds the lock.

    Args:
        uri: a folder or an `s3://` prefix.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    @property
    def lock_uri(self) -> str:
        return storage.join(self.uri, LOCK)

    def committed(self) -> Committed | None:
        """The table, where there is a complete one.

        Raises:
            DataError: the folder holds the mark of something else.
        """
        mark = read_mark(self.uri)
        if mark is None:
            return None
        try:
            summary = dict(json.loads(storage.read_bytes(storage.join(self.uri, SUMMARY))))
        except FileNotFoundError:  # somebody deleted it; the table does not need it
            summary = {}
        return Committed(**asdict(mark), summary=summary)

    def unfinished(self) -> Generation | None:
        """The newest generation that was completely begun and is not published."""
        published = self._published()
        numbers = [number for number, names in self._generations().items() if "plan.json" in names]
        number = max(numbers, default=0)
        if number <= published:
            return None
        uri = self._generation_uri(number)
        return Generation(number, uri, dict(json.loads(storage.read_bytes(storage.join(uri, "plan.json")))))

    def begin(self, plan: Mapping[str, Any], *, manifest: Callable[[str], None]) -> Generation:
        """A new generation, after all that was ever here.

        Args:
            plan: what must be the same when the work goes on; JSON values, `model_id` among them.
            manifest: writes the manifest to the URI that it is given.

        Raises:
            ValueError: the plan names no model.
        """
        if "model_id" not in plan:  # or the commit would find out, after all the work
            raise ValueError(f"a plan has a model_id. Received: {', '.join(plan)}")
        self.sweep()
        parts = (int(match[1]) for name in self._names() if (match := _PART.fullmatch(name)))
        number = max([0, self._published(), *self._generations(), *parts]) + 1
        generation = Generation(number, self._generation_uri(number), dict(plan))
        manifest(generation.manifest_uri)
        storage.write_bytes(storage.join(generation.uri, "plan.json"), json.dumps(plan, indent=2).encode())
        return generation

    def discard(self, generation: Generation) -> None:
        """Deletes a generation and the work in it.

        Raises:
            MnistDistError: its commit was begun; the table that was is not whole any more.
        """
        if generation.is_committing:
            raise MnistDistError(f"a commit that was begun is brought to its end first. Received: {generation.uri!r}")
        self._delete(generation.number)

    def sweep(self) -> None:
        """Deletes what killed drivers left: generations published or never completely begun, a second mark."""
        self.sweep_published()
        mark = read_mark(self.uri)
        if mark is not None and not mark.failed:  # `rejudge` was killed between its two steps
            storage.delete(storage.join(self.uri, FAILED))
        for number, names in self._generations().items():
            if "plan.json" not in names:
                self._delete(number)

    def sweep_published(self, *, step: Step = _go_on) -> None:
        """Deletes generations that were published; of a driver that just lost the lock, that hurts nobody."""
        published = self._published()
        for number in sorted(self._generations()):
            if number <= published:
                step(f"delete g{number:04d}")
                self._delete(number)

    def _delete(self, number: int) -> None:
        uri = self._generation_uri(number)
        storage.delete(storage.join(uri, "plan.json"))  # first: killed midway, what is left is debris
        storage.delete_tree(uri)

    def _published(self) -> int:
        mark = read_mark(self.uri)
        return mark.generation if mark else 0

    def _generation_uri(self, number: int) -> str:
        return storage.join(self.uri, WORK, f"g{number:04d}")

    def _generations(self) -> dict[int, set[str]]:
        """The names in each generation's folder."""
        found: dict[int, set[str]] = {}
        for name in self._names(WORK):
            if match := _GENERATION.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def _names(self, below: str = "") -> Iterator[str]:
        """Everything in the folder, relative to it."""
        for entry in storage.scan_entries(storage.join(self.uri, below) if below else self.uri):
            yield entry.uri.removeprefix(f"{self.uri}/")


# --- publishing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """What `commit.json` holds: all that is still to be done needs nothing else."""

    generation: int
    add: list[str]
    remove: list[str]
    files: list[str]
    rows: int
    model_id: str
    ok: bool
    summary: dict[str, Any]

    def mark(self) -> Mark:
        return Mark(
            generation=self.generation,
            files=tuple(self.files),
            rows=self.rows,
            model_id=self.model_id,
            failed=not self.ok,
        )


def commit(
    output: Output,
    generation: Generation,
    *,
    shards: int,
    schema: pa.Schema,
    superseded: bool,
    replace_all: bool,
    judge: Callable[[Mapping[str, int], int], bool],
    summary: Mapping[str, Any],
    check: Callable[[], None],
    progress: Callable[[int, int], None],
    part_bytes: int = PART_BYTES,
    step: Step = _go_on,
) -> Committed:
    """Makes the table of a generation all of whose shards are done; one that was begun is brought to its end.

    Args:
        output: where the table lies.
        generation: whose shards become rows.
        shards: how many it has.
        schema: of the table.
        superseded: the images may have rows in the old table, which these replace.
        replace_all: nothing of the old table stays.
        judge: whether the table is good enough, of the rows by status and all rows.
        summary: what `_summary.json` says beside the counts; JSON values.
        check: raises Locked when another driver has taken over.
        progress: is told how many shards are through, and of how many.
        part_bytes: about how large a file becomes.
        step: see `Step`.

    Raises:
        MnistDistError: a shard does not hold the rows of its manifest.
        ConfigError: the old table, of which rows stay, has other columns.
        Locked: see `check`.
        DataError, PermissionError, ServiceError, StorageError: the storage, or the old table, cannot be used.
    """
    if not generation.is_committing:
        building = _Building(output, generation, schema=schema, part_bytes=part_bytes, step=step)
        table = building.build(shards=shards, superseded=superseded, replace_all=replace_all, progress=progress)
        counts = table.counts()
        decision = _Decision(
            generation=generation.number,
            add=table.added,
            remove=table.removed,
            files=table.files,
            rows=table.rows,
            model_id=generation.plan["model_id"],
            ok=judge(counts, table.rows),
            summary={
                **summary,
                "generation": generation.number,
                "rows": table.rows,
                "files": table.files,
                "statuses": counts,
                "examples": table.examples,
                "model_id": generation.plan["model_id"],
            },
        )
        check()
        step("write commit.json")
        storage.write_bytes(generation.commit_uri, json.dumps(asdict(decision), indent=2).encode())
    return replay(output, generation, check=check, step=step)


def replay(output: Output, generation: Generation, *, check: Callable[[], None], step: Step = _go_on) -> Committed:
    """Brings a commit to its end, however far it went; nothing of the old table is needed any more.

    Raises:
        MnistDistError: a file that was to be published is gone.
        Locked: see `check`.
        PermissionError, ServiceError, StorageError: see `storage`.
    """
    decision = _Decision(**json.loads(storage.read_bytes(generation.commit_uri)))
    mark = read_mark(output.uri)
    if mark is None or mark.generation != decision.generation:  # else all that is left is to sweep
        _publish(output, generation, decision, check=check, step=step)
    output.sweep_published(step=step)
    return Committed(**asdict(decision.mark()), summary=decision.summary)


def rejudge(output: Output, committed: Committed, *, ok: bool) -> Committed:
    """Marks a table as good or failed without scoring anything; called again where it was killed midway."""
    mark = Mark(
        generation=committed.generation,
        files=committed.files,
        rows=committed.rows,
        model_id=committed.model_id,
        failed=not ok,
    )
    mark.write(output.uri)  # before the other one goes: a table without a mark would be lost
    storage.delete(storage.join(output.uri, SUCCESS if mark.failed else FAILED))
    return Committed(**asdict(mark), summary=committed.summary)


def _publish(
    output: Output, generation: Generation, decision: _Decision, *, check: Callable[[], None], step: Step
) -> None:
    check()
    for name in (SUCCESS, FAILED):  # from here on there is no table, until the mark is put again
        step(f"delete {name}")
        storage.delete(storage.join(output.uri, name))
    _move_all([*decision.add, MANIFEST], generation.out_uri, output.uri, step=step)
    for name in sorted({*decision.remove, *_orphans(output, decision)}):
        step(f"delete {name}")
        storage.delete(storage.join(output.uri, name))
    step(f"write {SUMMARY}")
    storage.write_bytes(storage.join(output.uri, SUMMARY), json.dumps(decision.summary, indent=2).encode())
    check()
    step(f"write {decision.mark().name}")
    decision.mark().write(output.uri)


def _orphans(output: Output, decision: _Decision) -> Iterator[str]:
    """What no table names: of generations whose `_work` somebody deleted, and of writes that were killed."""
    for name in output._names():
        match = _PART.fullmatch(name)
        is_part = match is not None and int(match[1]) <= decision.generation
        if (is_part and name not in decision.files) or _LEFT_BY_KILLED.fullmatch(name):
            yield name


def _move_all(names: Iterable[str], source: str, target: str, *, step: Step) -> None:
    with ThreadPoolExecutor(THREADS) as pool:  # readers have no table meanwhile, and S3 has to copy
        moves = []
        for name in names:
            step(f"move {name}")
            moves.append(pool.submit(_move, storage.join(source, name), storage.join(target, name)))
        for move in moves:
            move.result()


def _move(source: str, target: str) -> None:
    try:
        storage.move(source, target)
    except FileNotFoundError as err:
        if not storage.exists(target):
            raise MnistDistError(f"a file that was to be published is neither at {source} nor at {target}") from err


# --- building --------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows of the table, and the same rows as `_manifest.parquet` has them."""

    rows: pa.Table
    listed: pa.Table


@dataclass
class _Table:
    """The table that is to be, file by file."""

    listing: pq.ParquetWriter
    files: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    rows: int = 0
    examples: dict[str, list[dict[str, str | None]]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, listed: pa.Table) -> None:
        """The next file, and what is in it."""
        self.files.append(name)
        self.rows += len(listed)
        self.listing.write_table(listed, row_group_size=max(len(listed), 1))
        for item in pc.value_counts(listed["status"]).to_pylist():
            self._counts[item["values"]] += item["counts"]
            if item["values"] != "ok":
                self._note_examples(item["values"], listed)

    def counts(self) -> dict[str, int]:
        """Rows of each status."""
        return {status: self._counts[status] for status in STATUSES}

    def _note_examples(self, status: str, listed: pa.Table) -> None:
        examples = self.examples.setdefault(status, [])
        if len(examples) < EXAMPLES:
            rows = listed.select(["uri", "error"]).filter(pc.equal(listed["status"], status))
            examples += rows.slice(0, EXAMPLES - len(examples)).to_pylist()


@dataclass(frozen=True)
class _Building:
    """Writes the files of a generation's table into its `out`; what was there of an earlier try goes first."""

    output: Output
    generation: Generation
    schema: pa.Schema = field(kw_only=True)
    part_bytes: int = field(kw_only=True)
    step: Step = field(kw_only=True)

    def build(
        self, *, shards: int, superseded: bool, replace_all: bool, progress: Callable[[int, int], None]
    ) -> _Table:
        self.step("clear out")
        storage.delete_tree(self.generation.out_uri)
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = stack.enter_context(self._new_file(MANIFEST))
            table = _Table(stack.enter_context(pq.ParquetWriter(file, LISTED, compression="zstd")))
            manifest = stack.enter_context(_parquet(self.generation.manifest_uri, scratch / "new"))
            committed = self.output.committed()
            if committed and replace_all:
                table.removed += committed.files
            elif committed:
                old = stack.enter_context(_parquet(storage.join(self.output.uri, MANIFEST), scratch / "old"))
                gone = manifest.read(["uri"])["uri"] if superseded else None
                self._keep(committed, table, old=old, gone=gone)
            self._write(table, "", self._new_rows(manifest, shards, progress))
            if not table.files:
                self._write_part(table, self._name("", 0), iter(()))  # readers find the columns in it
        return table

    def _keep(self, committed: Committed, table: _Table, *, old: pq.ParquetFile, gone: pa.ChunkedArray | None) -> None:
        """Takes over the old files, or what is left of them without the rows of the images in `gone`."""
        if not table_schema(self.output.uri).equals(self.schema):
            raise ConfigError(
                f"the table has the same columns as before, or is made afresh (mode fresh). Received: "
                f"{', '.join(self.schema.names)}"
            )
        if old.num_row_groups != len(committed.files):
            raise DataError(f"{self.output.uri}/{MANIFEST} is not that of the table there; make it afresh (mode fresh)")
        touched = []
        for index, name in enumerate(committed.files):
            listed = old.read_row_group(index)
            if gone is not None and pc.any(pc.is_in(listed["uri"], value_set=gone)).as_py():
                touched.append(index)
            else:
                table.note(name, listed)
        table.removed += [committed.files[index] for index in touched]
        if gone is not None:
            left = itertools.chain.from_iterable(
                self._left_rows(committed.files[index], old.read_row_group(index), gone) for index in touched
            )
            self._write(table, "kept-", left)

    def _left_rows(self, name: str, listed: pa.Table, gone: pa.ChunkedArray) -> Iterator[_Rows]:
        for rows in read_row_groups(storage.join(self.output.uri, name)):
            its, listed = listed.slice(0, len(rows)), listed.slice(len(rows))
            if not rows["uri"].equals(its["uri"]):
                raise DataError(f"{self.output.uri}: {name} does not hold what {MANIFEST} says; make it afresh")
            left = pc.invert(pc.is_in(rows["uri"], value_set=gone))
            yield _Rows(rows.filter(left), its.filter(left))

    def _new_rows(self, manifest: pq.ParquetFile, shards: int, progress: Callable[[int, int], None]) -> Iterator[_Rows]:
        if manifest.num_row_groups != shards:
            raise MnistDistError(f"{self.generation.manifest_uri} has {manifest.num_row_groups} shards, not {shards}")
        uris = [self.generation.shard_uri(shard) for shard in range(shards)]
        for shard, data in enumerate(_read_ahead(uris)):
            listed = manifest.read_row_group(shard, columns=list(_SOURCE_COLUMNS))
            rows = _rows_of_shard(uris[shard], data, schema=self.schema, expected=listed["uri"])
            yield _Rows(rows, _listed(rows, listed))
            progress(shard + 1, shards)

    def _write(self, table: _Table, kind: str, pieces: Iterator[_Rows]) -> None:
        """Writes pieces into as many files as they need: `part-g0001-00000.parquet`, ..."""
        groups = _grouped(pieces, least_bytes=min(ROW_GROUP_BYTES, self.part_bytes))
        for number in itertools.count():
            first = next(groups, None)
            if first is None:
                return
            self._write_part(table, self._name(kind, number), itertools.chain([first], groups))

    def _name(self, kind: str, number: int) -> str:
        return f"part-g{self.generation.number:04d}-{kind}{number:05d}.parquet"

    def _write_part(self, table: _Table, name: str, groups: Iterator[_Rows]) -> None:
        listed = [LISTED.empty_table()]
        with self._new_file(name) as file, pq.ParquetWriter(file, self.schema, compression="zstd") as writer:
            for group in groups:
                writer.write_table(group.rows, row_group_size=len(group.rows))
                listed.append(group.listed)
                if file.tell() >= self.part_bytes or sum(map(len, listed)) >= PART_ROWS:
                    break
        table.added.append(name)
        table.note(name, pa.concat_tables(listed))

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        """A file that is in `out` when the block ends without an error."""
        self.step(f"write {name}")
        with storage.new_object(storage.join(self.generation.out_uri, name)) as file:
            yield file
            self.step(f"put {name}")


def _rows_of_shard(uri: str, data: bytes, *, schema: pa.Schema, expected: pa.ChunkedArray) -> pa.Table:
    try:
        rows = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as err:
        raise MnistDistError(f"{uri} is not readable; delete it and run the same command again: {err}") from err
    if not rows.schema.equals(schema) or not rows["uri"].equals(expected):
        raise MnistDistError(
            f"a shard holds the rows of its manifest in their order; delete {uri} and run the same command again. "
            f"Received: {len(rows)} rows of {', '.join(rows.schema.names)}, expected {len(expected)} of "
            f"{', '.join(schema.names)}"
        )
    return rows


def _listed(rows: pa.Table, source: pa.Table) -> pa.Table:
    def known(name: str) -> pa.ChunkedArray:
        return pc.coalesce(rows[name], source[name]) if name in rows.column_names else source[name]

    error = rows["error"] if "error" in rows.column_names else pa.nulls(len(rows), pa.string())
    return pa.table([rows["uri"], known("size_bytes"), known("etag"), rows["status"], error], schema=LISTED)


def _grouped(pieces: Iterator[_Rows], *, least_bytes: int) -> Iterator[_Rows]:
    """Joins pieces, and cuts those of large shards, up to about the size of a row group; none is empty."""
    held, size_bytes = list[_Rows](), 0
    for piece in itertools.chain.from_iterable(map(_cut, pieces)):
        held.append(piece)
        size_bytes += piece.rows.nbytes
        if size_bytes >= least_bytes:
            yield _joined(held)
            held, size_bytes = [], 0
    if held:
        yield _joined(held)


def _cut(piece: _Rows) -> Iterator[_Rows]:
    count = len(piece.rows)
    length = -(-count // max(1, piece.rows.nbytes // ROW_GROUP_BYTES))
    for start in range(0, count, max(1, length)):
        yield _Rows(piece.rows.slice(start, length), piece.listed.slice(start, length))


def _joined(held: Sequence[_Rows]) -> _Rows:
    return _Rows(pa.concat_tables([item.rows for item in held]), pa.concat_tables([item.listed for item in held]))


def _read_ahead(uris: Sequence[str]) -> Iterator[bytes]:
    """The objects in order, a few of them already in memory."""
    ahead: collections.deque[Future[bytes]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for uri in uris:
            ahead.append(pool.submit(_read_shard, uri))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read_shard(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as err:
        raise MnistDistError(f"a shard that is to be published is not there. Received: {uri!r}") from err


@contextlib.contextmanager
def _parquet(uri: str, scratch: Path) -> Iterator[pq.ParquetFile]:
    """A file that is read here and there."""
    try:
        file = pq.ParquetFile(storage.local_path(uri, scratch))
    except (pa.ArrowInvalid, FileNotFoundError) as err:
        raise DataError(f"{uri} cannot be read: {err}") from err
    with file:
        yield file
