"""Speed and memory of what a driver does alone: listing an S3 bucket, going on with large work, finding what is new.

Owns: what is measured, the bucket that it lists (a server on loopback that makes its pages on the fly), and the
manifests that it goes on with. Does not own: the code that is measured, which is the job's own (`scoring/`).

Contract: each measurement is a process of its own and says itself how long it took and the most memory it held; of
several rounds the shortest time counts, since other work on a machine only adds to it, and the largest memory. A
measurement counts only if it found as many keys or rows as there are.

- `listing`: `list_inputs` over a prefix of S3, at a fifth of the keys and at all of them, from the first request to the
  columns. Nothing but these columns grows with the keys.
- `resume`: what a driver does with an unfinished generation of which nine shards of ten are done, from the lock to the
  list of shards that it gives to Ray.
- `incremental`: a table's manifest is read and compared with a listing, of which a tenth is new.
"""

import bisect
import contextlib
import http.client
import os
import resource
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist import processor
from mnist_dist.config import InputConfig, require
from mnist_dist.console import Console
from mnist_dist.errors import MnistDistError
from mnist_dist.scoring import image_table
from mnist_dist.scoring.generations import MANIFEST, Output, Plan
from mnist_dist.scoring.image_table import ImageRow
from mnist_dist.scoring.inputs import list_inputs
from mnist_dist.scoring.manifest import MIN_SHARD, Manifest, choose_shard_size, write_manifest
from mnist_dist.scoring.parts import LISTED
from mnist_dist.scoring.selection import new_rows

Case = Literal["listing", "resume", "incremental"]
Figures = dict[str, float]
"""`seconds`, `peak_bytes` of the process, and what was counted."""

FOLDER_KEYS = 1_000
PAGE_KEYS = 1_000  # S3's own limit
PART_OF_KEYS = 5  # one in so many is listed first, to see what grows
NEW_OF_ROWS = 10  # one shard in so many is not done, one row in so many is new
GROUP_ROWS = 250_000  # of a table's manifest: about a file of the table
GOLDEN = 0x9E3779B97F4A7C15F39CC0605CEDC835  # odd: multiples are distinct, and look random
AFTER_ALL = chr(0x10FFFF)  # above whatever follows a prefix


@dataclass(frozen=True, kw_only=True)
class ListingBenchmark:
    """What to measure."""

    cases: tuple[Case, ...] = ("listing", "resume", "incremental")
    """`listing`: a bucket on loopback. `resume`: planning what is left of a generation. `incremental`: finding what is
    new."""
    keys: int = 1_000_000
    """Objects in the bucket."""
    rows: int = 10_000_000
    """Images of the manifests; nine of ten are done, or known."""
    rounds: int = 2
    """Measurements of each; the shortest time counts."""
    verbose: bool = False
    """Show what is logged."""

    def __post_init__(self) -> None:
        require(bool(self.cases), "cases must be among listing, resume, incremental", cases=self.cases)
        require(self.keys >= PART_OF_KEYS, f"keys must be at least {PART_OF_KEYS}", keys=self.keys)
        least = NEW_OF_ROWS * MIN_SHARD  # as many shards as leave one to do
        require(self.rows >= least, f"rows must be at least {least}", rows=self.rows)
        require(self.rounds >= 1, "rounds must be at least 1", rounds=self.rounds)


def measure(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures every case and gives machine, date and figures.

    Raises:
        MnistDistError: something was not found that is there.
    """
    result: dict[str, Any] = {
        "machine": processor.described(),
        "date": date.today().isoformat(),
        "rounds": benchmark.rounds,
    }
    if "listing" in benchmark.cases:
        result["listing"] = _measure_listing(benchmark, console=console)
    if "resume" in benchmark.cases:
        result["resume"] = _measure_resume(benchmark, console=console)
    if "incremental" in benchmark.cases:
        result["incremental"] = _measure_incremental(benchmark, console=console)
    return result


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The result as rows of cells, the first one titles."""
    rows = [["what", "seconds", "a second", "peak memory, MB", "notes"]]
    if "listing" in result:
        found = result["listing"]
        for part in (found["part"], found["all"]):
            columns = f"columns {part['column_bytes'] / 1e6:,.0f} MB"
            note = f"{part['pages']:,} pages, {part['cpu_s']:.1f} s of a core; {columns}"
            rows.append(_cells(f"list {part['keys']:,} keys", part, part["keys"], note))
        grown = f"a key: {found['bytes_per_key']:.0f} bytes of memory, {found['column_bytes_per_key']:.0f} of columns"
        server = f"{found['server_keys_per_s']:,.0f}"
        rows.append(["the server's own limit, pages not parsed", "", server, "", grown])
    if "resume" in result:
        found = result["resume"]
        note = f"{found['rows_left']:,} left in {found['shards_left']:,} of {found['shards']:,} shards"
        rows.append(_cells(f"plan a resume of {found['rows']:,} rows", found, found["rows"], note))
    if "incremental" in result:
        found = result["incremental"]
        note = f"{found['new']:,} new; {found['listing_bytes'] / 1e6:,.0f} MB held before, by the listing"
        rows.append(_cells(f"compare {found['rows']:,} rows with a listing", found, found["rows"], note))
    rows.append([f"{result['machine']}, {result['date']}", "", "", "", f"best of {result['rounds']}"])
    return rows


def _cells(what: str, figures: Mapping[str, float], count: int, note: str) -> list[str]:
    seconds = figures["seconds"]
    return [what, f"{seconds:.2f}", f"{count / seconds:,.0f}", f"{figures['peak_bytes'] / 1e6:,.0f}", note]


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure_listing(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    keys, part = benchmark.keys, benchmark.keys // PART_OF_KEYS
    with running_server() as server:
        limit = max(_server_keys_per_s(server, keys) for _ in range(benchmark.rounds))
        console.line(f"the server alone: {limit:,.0f} keys/s")
        found = {}
        for name, count in (("part", part), ("all", keys)):
            before = server.pages()
            found[name] = _best(benchmark, list_bucket, server.endpoint, count)
            found[name]["pages"] = (server.pages() - before) // benchmark.rounds
            _check(count, found[name]["keys"], "keys of the bucket are listed")
            speed = count / found[name]["seconds"]
            console.line(f"{count:,} keys: {speed:,.0f} keys/s, {found[name]['peak_bytes'] / 1e6:,.0f} MB")
    peaks, columns = ([found[name][what] for name in ("part", "all")] for what in ("peak_bytes", "column_bytes"))
    return {
        **found,
        "keys_per_s": keys / found["all"]["seconds"],
        "bytes_per_key": (peaks[1] - peaks[0]) / (keys - part),
        "column_bytes_per_key": (columns[1] - columns[0]) / (keys - part),
        "server_keys_per_s": limit,
    }


def _measure_resume(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    rows = benchmark.rows
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        console.line(f"writing a manifest of {rows:,} rows")
        written = _in_process(write_unfinished, folder, rows)
        found = _best(benchmark, plan_resume, folder)
    _check(rows, found["rows"], "rows of the manifest are planned")
    _check(written["rows_left"], found["rows_left"], "rows are left")
    console.line(f"planning a resume: {found['seconds']:.2f} s, {found['peak_bytes'] / 1e6:,.0f} MB")
    return found


def _measure_incremental(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    rows = benchmark.rows
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        console.line(f"writing the manifest of a table of {rows:,} rows")
        _in_process(write_committed, folder, rows)
        found = _best(benchmark, find_new, folder, rows)
    _check(rows // NEW_OF_ROWS, found["new"], "rows are new")
    console.line(f"finding what is new: {found['seconds']:.2f} s, {found['peak_bytes'] / 1e6:,.0f} MB")
    return {"rows": rows, **found}


def _best(benchmark: ListingBenchmark, work: Callable[..., Figures], *arguments: object) -> Figures:
    """The round that took least time, with the largest memory of all."""
    rounds = [_in_process(work, *arguments) for _ in range(benchmark.rounds)]
    best = min(rounds, key=lambda figures: figures["seconds"])
    return {**best, "peak_bytes": max(figures["peak_bytes"] for figures in rounds)}


def _in_process(work: Callable[..., Figures], *arguments: object) -> Figures:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _check(expected: float, found: float, what: str) -> None:
    if expected != found:
        raise MnistDistError(f"{expected:,} {what}. Received: {found:,}")


def peak_memory_bytes() -> int:
    """Most memory that this program held at once; not that of the one that started it, which `getrusage` counts."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# --- what is measured, each in a process of its own ------------------------------------------------------------------


def list_bucket(endpoint: str, keys: int) -> Figures:
    """Lists a bucket of the server."""
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}
    began, cpu_began = time.perf_counter(), time.process_time()
    found = list_inputs(InputConfig(input=(f"s3://{bucket_of(keys)}/images",))).table
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "keys": len(found),
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_bytes": peak_memory_bytes(),
        "column_bytes": sum(found[name].nbytes for name in ("uri", "size_bytes", "etag")),
    }


def plan_resume(folder: str) -> Figures:
    """What `on_ray/scoring/score.py` does between taking the lock and giving Ray the shards."""
    began = time.perf_counter()
    output = Output(folder)
    output.sweep()
    generation = output.unfinished()
    assert generation is not None, "it was written for this"
    with Manifest(generation.manifest_uri) as manifest:
        shards = manifest.shards
    assert len(generation.done_shards()) < shards, "some were left out"
    done = generation.done_shards()
    with Manifest(generation.manifest_uri) as manifest:
        rows, left = manifest.rows, [shard for shard in range(manifest.shards) if shard not in done]
        rows_done = sum(manifest.shard_rows(shard) for shard in done)
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory_bytes(),
        "rows": rows,
        "rows_left": rows - rows_done,
        "shards": shards,
        "shards_left": len(left),
    }


def find_new(folder: str, rows: int) -> Figures:
    """Compares a table's manifest with a listing, of which the last tenth is new."""
    found = listed_table(rows // NEW_OF_ROWS, rows)
    held = psutil.Process().memory_info().rss
    began = time.perf_counter()
    new = new_rows(found, Output(folder))
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory_bytes(),
        "listing_bytes": held,
        "new": len(new),
    }


# --- what is there already -------------------------------------------------------------------------------------------


def write_unfinished(folder: str, rows: int) -> Figures:
    """An output whose generation has nine shards of ten done; they are empty, since a driver reads only their names."""
    found = listed_table(0, rows)
    size = choose_shard_size(rows, total_bytes=pc.sum(found["size_bytes"]).as_py())
    plan = Plan(model_id="benchmark", settings={}, mode="fresh", keep_old=False, began_at="")
    generation = Output(folder).reserve(plan)
    generation.begin(lambda uri: write_manifest(uri, found, shard_size=size))
    rows_left = 0
    with Manifest(generation.manifest_uri) as manifest:
        for shard in range(manifest.shards):
            if shard % NEW_OF_ROWS == NEW_OF_ROWS - 1:
                rows_left += manifest.shard_rows(shard)
            else:
                Path(generation.shard_uri(shard)).touch()
    return {"rows_left": rows_left}


def write_committed(folder: str, rows: int) -> Figures:
    """The manifest of a table; of the table itself a comparison reads nothing."""
    with pq.ParquetWriter(Path(folder) / MANIFEST, LISTED, compression="zstd") as writer:
        for start in range(0, rows, GROUP_ROWS):
            found = listed_table(start, min(GROUP_ROWS, rows - start))
            ok = pa.repeat(pa.scalar("ok", LISTED.field("status").type), len(found))
            found = found.set_column(found.column_names.index("status"), LISTED.field("status"), ok)
            writer.write_table(found.select(LISTED.names).cast(LISTED), row_group_size=len(found))
    return {}


def listed_table(start: int, rows: int) -> pa.Table:
    """Images as `list_inputs` gives them, by their numbers."""
    numbers = range(start, start + rows)
    return image_table.table_of(ImageRow(f"s3://bucket/{key_of(n)}", size_of(n), etag_of(n)) for n in numbers)


# --- a bucket --------------------------------------------------------------------------------------------------------


def bucket_of(keys: int) -> str:
    """Name of the server's bucket that holds so many objects."""
    return f"keys-{keys}"


def key_of(number: int) -> str:
    """Keys are in the order of their numbers."""
    return f"images/{number // FOLDER_KEYS:07d}/{number:010d}.jpg"


def size_of(number: int) -> int:
    """In bytes, 68 KB on average."""
    return 60_000 + number % 16_000


def etag_of(number: int) -> str:
    """32 digits without a pattern, as S3's."""
    return f"{number * GOLDEN % 2**128:032x}"


@dataclass(frozen=True)
class Server:
    """A server that has a bucket of any size; one client at a time."""

    endpoint: str
    connection: "Connection[None, int]"

    def pages(self) -> int:
        """How many it has sent so far."""
        self.connection.send(None)
        return self.connection.recv()


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server on loopback, in a process of its own that ends with this one."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Server(f"http://127.0.0.1:{ours.recv()}", ours)
    finally:
        ours.close()  # which ends it
        process.join()


def page(keys: int, query: Mapping[str, str]) -> str:
    """The answer to ListObjectsV2, as XML.

    Args:
        keys: of the bucket.
        query: `prefix`, `delimiter`, `max-keys`, `continuation-token`: here the number of the next key.
    """
    prefix, delimiter, most = query.get("prefix", ""), query.get("delimiter", ""), query.get("max-keys", PAGE_KEYS)
    number, end = _first(keys, prefix), _first(keys, prefix + AFTER_ALL)
    number = int(query.get("continuation-token", number))
    items = list[str]()
    while number < end and len(items) < int(most):
        key = key_of(number)
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0:
            folder = key[: cut + len(delimiter)]
            items.append(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>")
            number = _first(keys, folder + AFTER_ALL)
        else:
            items.append(
                f"<Contents><Key>{key}</Key><LastModified>2026-01-31T12:00:00.000Z</LastModified>"
                f"<ETag>&quot;{etag_of(number)}&quot;</ETag><Size>{size_of(number)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            number += 1
    more = f"<NextContinuationToken>{number}</NextContinuationToken>" if number < end else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket_of(keys)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items)}</KeyCount>"
        f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(number < end).lower()}</IsTruncated>{more}{''.join(items)}"
        "</ListBucketResult>"
    )


def _first(keys: int, text: str) -> int:
    """The number of the first key that is not below a text."""
    return bisect.bisect_left(range(keys), text, key=key_of)


class _HTTPServer(ThreadingHTTPServer):
    pages = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a client keeps its connection
    disable_nagle_algorithm = True  # head and body are two packets: the second would wait for the client's answer
    server: _HTTPServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        values = dict(urllib.parse.parse_qsl(query))
        bucket, _, key = path.strip("/").partition("/")
        if key or values.get("list-type") != "2":
            self.send_error(404)
            return
        body = page(int(bucket.removeprefix(bucket_of(0)[:-1])), values).encode()
        self.server.pages += 1
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A line a page is of no use."""


def _serve(connection: "Connection[int, None]") -> None:
    server = _HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection.send(server.server_port)
    with contextlib.suppress(EOFError):  # whoever started it has ended
        while True:
            connection.recv()
            connection.send(server.pages)


def _server_keys_per_s(server: Server, keys: int) -> float:
    """How fast the server is for a client that does not look into the pages."""
    began = time.perf_counter()
    client = http.client.HTTPConnection(server.endpoint.removeprefix("http://"))
    for number in range(0, keys, PAGE_KEYS):
        client.request("GET", f"/{bucket_of(keys)}?list-type=2&prefix=images/&continuation-token={number}")
        client.getresponse().read()
    client.close()
    return keys / (time.perf_counter() - began)
