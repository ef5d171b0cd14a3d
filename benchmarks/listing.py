"""Speed and memory of the driver's own work: listing an S3 bucket, resuming a large job, finding new images.

Owns: what is measured, the bucket to list (a server on loopback that generates its pages on the fly) and the manifests
to resume. Does not own: the measured code, which is the job's own (`scoring/`).

Contract: each measurement is a process of its own that reports its time and its peak memory. Of several rounds the
shortest time counts, because other work on the machine can only add to it, and the largest memory. A measurement
counts only if it found every key or row.

- `listing`: `list_inputs` over an S3 prefix with a fifth of the keys and with all of them, from the first request to
  the columns. Only these columns grow with the number of keys.
- `resume`: a driver's work on an unfinished generation with nine of ten shards done, from the lock to the list of
  shards for Ray.
- `incremental`: reading a table's manifest and comparing it with a listing of which a tenth is new.
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
from mnist_dist.config import require
from mnist_dist.console import Console
from mnist_dist.errors import MnistDistError
from mnist_dist.score_config import InputConfig
from mnist_dist.scoring.generations import MANIFEST, Output, Plan
from mnist_dist.scoring.manifest import MIN_SHARD, Manifest, choose_shard_size, write_manifest
from mnist_dist.scoring.parts import LISTED
from mnist_dist.scoring.selection import new_rows
from mnist_dist.sources import image_table
from mnist_dist.sources.image_table import ImageRow
from mnist_dist.sources.listing import list_inputs

Case = Literal["listing", "resume", "incremental"]
Figures = dict[str, float]
"""`seconds`, `peak_bytes` of the process, and its counts."""

FOLDER_KEYS = 1_000
PAGE_KEYS = 1_000  # S3's own limit per page.
PART_OF_KEYS = 5  # A first listing has one key in this many, to see how memory grows.
NEW_OF_ROWS = 10  # One shard in this many is not done; one row in this many is new.
GROUP_ROWS = 250_000  # Rows per group of a table's manifest, about one file of the table.
FENCE = 1  # Number of the lock under which a prepared output was made.
GOLDEN = 0x9E3779B97F4A7C15F39CC0605CEDC835  # Odd, so that its multiples are distinct and look random.
AFTER_ALL = chr(0x10FFFF)  # Sorts after anything that may follow a prefix.


@dataclass(frozen=True, kw_only=True)
class ListingBenchmark:
    """What to measure."""

    cases: tuple[Case, ...] = ("listing", "resume", "incremental")
    """`listing`: list a bucket on loopback. `resume`: plan the rest of a generation. `incremental`: find new images."""
    keys: int = 1_000_000
    """Objects in the bucket."""
    rows: int = 10_000_000
    """Images in the manifests; nine of ten are done, or known already."""
    rounds: int = 2
    """Number of measurements of each case; the shortest time counts."""
    verbose: bool = False
    """Show the log."""

    def __post_init__(self) -> None:
        require(bool(self.cases), "cases must be among listing, resume, incremental", cases=self.cases)
        require(self.keys >= PART_OF_KEYS, f"keys must be at least {PART_OF_KEYS}", keys=self.keys)
        min_rows = NEW_OF_ROWS * MIN_SHARD  # Enough shards that one is left to do.
        require(self.rows >= min_rows, f"rows must be at least {min_rows}", rows=self.rows)
        require(self.rounds >= 1, "rounds must be at least 1", rounds=self.rounds)


def measure(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures every case; returns machine, date and figures.

    Raises:
        MnistDistError: a measurement missed keys or rows.
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
    """The result as rows of cells; the first row holds the titles."""
    rows = [["what", "seconds", "a second", "peak memory, MB", "notes"]]
    if "listing" in result:
        figures = result["listing"]
        for part in (figures["part"], figures["all"]):
            columns = f"columns {part['column_bytes'] / 1e6:,.0f} MB"
            note = f"{part['pages']:,} pages, {part['cpu_s']:.1f} s of a core; {columns}"
            rows.append(_cells(f"list {part['keys']:,} keys", part, part["keys"], note))
        grown = (
            f"a key: {figures['bytes_per_key']:.0f} bytes of memory, {figures['column_bytes_per_key']:.0f} of columns"
        )
        server = f"{figures['server_keys_per_s']:,.0f}"
        rows.append(["the server's own limit, pages not parsed", "", server, "", grown])
    if "resume" in result:
        figures = result["resume"]
        note = f"{figures['rows_left']:,} left in {figures['shards_left']:,} of {figures['shards']:,} shards"
        rows.append(_cells(f"plan a resume of {figures['rows']:,} rows", figures, figures["rows"], note))
    if "incremental" in result:
        figures = result["incremental"]
        note = f"{figures['new']:,} new; {figures['listing_bytes'] / 1e6:,.0f} MB held before, by the listing"
        rows.append(_cells(f"compare {figures['rows']:,} rows with a listing", figures, figures["rows"], note))
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
        figures = {}
        for name, count in (("part", part), ("all", keys)):
            before = server.pages()
            figures[name] = _best(benchmark, list_bucket, server.endpoint, count)
            figures[name]["pages"] = (server.pages() - before) // benchmark.rounds
            _check(count, figures[name]["keys"], "keys of the bucket are listed")
            speed = count / figures[name]["seconds"]
            console.line(f"{count:,} keys: {speed:,.0f} keys/s, {figures[name]['peak_bytes'] / 1e6:,.0f} MB")
    peaks, columns = ([figures[name][what] for name in ("part", "all")] for what in ("peak_bytes", "column_bytes"))
    return {
        **figures,
        "keys_per_s": keys / figures["all"]["seconds"],
        "bytes_per_key": (peaks[1] - peaks[0]) / (keys - part),
        "column_bytes_per_key": (columns[1] - columns[0]) / (keys - part),
        "server_keys_per_s": limit,
    }


def _measure_resume(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    rows = benchmark.rows
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        console.line(f"writing a manifest of {rows:,} rows")
        written = _in_process(write_unfinished, folder, rows)
        figures = _best(benchmark, plan_resume, folder)
    _check(rows, figures["rows"], "rows of the manifest are planned")
    _check(written["rows_left"], figures["rows_left"], "rows are left")
    console.line(f"planning a resume: {figures['seconds']:.2f} s, {figures['peak_bytes'] / 1e6:,.0f} MB")
    return figures


def _measure_incremental(benchmark: ListingBenchmark, *, console: Console) -> dict[str, Any]:
    rows = benchmark.rows
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        console.line(f"writing the manifest of a table of {rows:,} rows")
        _in_process(write_committed, folder, rows)
        figures = _best(benchmark, find_new, folder, rows)
    _check(rows // NEW_OF_ROWS, figures["new"], "rows are new")
    console.line(f"finding what is new: {figures['seconds']:.2f} s, {figures['peak_bytes'] / 1e6:,.0f} MB")
    return {"rows": rows, **figures}


def _best(benchmark: ListingBenchmark, work: Callable[..., Figures], *arguments: object) -> Figures:
    """The fastest round, with the largest memory of all rounds."""
    rounds = [_in_process(work, *arguments) for _ in range(benchmark.rounds)]
    best = min(rounds, key=lambda figures: figures["seconds"])
    return {**best, "peak_bytes": max(figures["peak_bytes"] for figures in rounds)}


def _in_process(work: Callable[..., Figures], *arguments: object) -> Figures:
    """Runs a function in a process of its own; returns its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _check(expected: float, received: float, what: str) -> None:
    if expected != received:
        raise MnistDistError(f"{expected:,} {what}. Received: {received:,}")


def peak_memory_bytes() -> int:
    """Peak memory of this process, without that of its parent, which `getrusage` includes."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# --- the measured work, each in a process of its own -----------------------------------------------------------------


def list_bucket(endpoint: str, keys: int) -> Figures:
    """Lists a bucket of the server and measures it."""
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}
    began, cpu_began = time.perf_counter(), time.process_time()
    images = list_inputs(InputConfig(input=(f"s3://{bucket_of(keys)}/images",))).table
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "keys": len(images),
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_bytes": peak_memory_bytes(),
        "column_bytes": sum(images[name].nbytes for name in ("uri", "size_bytes", "etag")),
    }


def plan_resume(folder: str) -> Figures:
    """Does what `on_ray/scoring/score.py` does between taking the lock and giving Ray the shards."""
    began = time.perf_counter()
    output = Output(folder)
    output.sweep(fence=FENCE)
    generation = output.unfinished()
    assert generation is not None, "write_unfinished made it"
    with Manifest(generation.manifest_uri) as manifest:
        shards = manifest.shards
    assert len(generation.done_shards()) < shards, "write_unfinished left some out"
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
    """Compares a table's manifest with a listing whose last tenth is new."""
    images = listed_table(rows // NEW_OF_ROWS, rows)
    listing_bytes = psutil.Process().memory_info().rss
    began = time.perf_counter()
    new = new_rows(images, Output(folder), number=FENCE)
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory_bytes(),
        "listing_bytes": listing_bytes,
        "new": len(new),
    }


# --- the prepared outputs --------------------------------------------------------------------------------------------


def write_unfinished(folder: str, rows: int) -> Figures:
    """Writes a generation with nine of ten shards done; they are empty, because a driver reads only their names."""
    images = listed_table(0, rows)
    size = choose_shard_size(rows, total_bytes=pc.sum(images["size_bytes"]).as_py())
    plan = Plan(model_id="benchmark", settings={}, mode="fresh", keep_old=False, began_at="")
    generation = Output(folder).new_generation(plan, fence=FENCE)
    generation.begin(lambda uri: write_manifest(uri, images, shard_size=size))
    rows_left = 0
    with Manifest(generation.manifest_uri) as manifest:
        for shard in range(manifest.shards):
            if shard % NEW_OF_ROWS == NEW_OF_ROWS - 1:
                rows_left += manifest.shard_rows(shard)
            else:
                Path(generation.shard_uri(shard)).touch()
    return {"rows_left": rows_left}


def write_committed(folder: str, rows: int) -> Figures:
    """Writes the manifest of a table; a comparison does not read the table itself."""
    path = Path(Output(folder).version_uri(FENCE, MANIFEST))
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, LISTED, compression="zstd") as writer:
        for start in range(0, rows, GROUP_ROWS):
            images = listed_table(start, min(GROUP_ROWS, rows - start))
            ok = pa.repeat(pa.scalar("ok", LISTED.field("status").type), len(images))
            images = images.set_column(images.column_names.index("status"), LISTED.field("status"), ok)
            writer.write_table(images.select(LISTED.names).cast(LISTED), row_group_size=len(images))
    return {}


def listed_table(start: int, rows: int) -> pa.Table:
    """A table of images with consecutive numbers, as `list_inputs` returns it."""
    numbers = range(start, start + rows)
    return image_table.table_of(ImageRow(f"s3://bucket/{key_of(n)}", size_of(n), etag_of(n)) for n in numbers)


# --- a bucket --------------------------------------------------------------------------------------------------------


def bucket_of(keys: int) -> str:
    """Name of the server's bucket with this many objects."""
    return f"keys-{keys}"


def key_of(number: int) -> str:
    """Key of an object; keys sort like their numbers."""
    return f"images/{number // FOLDER_KEYS:07d}/{number:010d}.jpg"


def size_of(number: int) -> int:
    """Size of an object in bytes, 68 KB on average."""
    return 60_000 + number % 16_000


def etag_of(number: int) -> str:
    """ETag of an object: 32 digits without a pattern, like S3's."""
    return f"{number * GOLDEN % 2**128:032x}"


@dataclass(frozen=True)
class Server:
    """A server with buckets of any size, for one client at a time."""

    endpoint: str
    connection: "Connection[None, int]"

    def pages(self) -> int:
        """Number of pages sent so far."""
        self.connection.send(None)
        return self.connection.recv()


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Runs a server on loopback, in a process of its own that ends with this one."""
    context = get_context("spawn")
    connection, server_connection = context.Pipe()
    process = context.Process(target=_serve, args=(server_connection,), daemon=True)
    process.start()
    server_connection.close()
    try:
        yield Server(f"http://127.0.0.1:{connection.recv()}", connection)
    finally:
        connection.close()  # The server ends when its connection closes.
        process.join()


def page(keys: int, query: Mapping[str, str]) -> str:
    """The answer to ListObjectsV2, as XML.

    Args:
        keys: number of objects in the bucket.
        query: `prefix`, `delimiter`, `max-keys`, `continuation-token` (here the number of the next key).
    """
    prefix, delimiter, max_keys = query.get("prefix", ""), query.get("delimiter", ""), query.get("max-keys", PAGE_KEYS)
    number, end = _first(keys, prefix), _first(keys, prefix + AFTER_ALL)
    number = int(query.get("continuation-token", number))
    items = list[str]()
    while number < end and len(items) < int(max_keys):
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
        f"<MaxKeys>{max_keys}</MaxKeys><IsTruncated>{str(number < end).lower()}</IsTruncated>{more}{''.join(items)}"
        "</ListBucketResult>"
    )


def _first(keys: int, text: str) -> int:
    """The number of the first key that does not sort before a text."""
    return bisect.bisect_left(range(keys), text, key=key_of)


class _HTTPServer(ThreadingHTTPServer):
    pages = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Clients can keep their connection.
    disable_nagle_algorithm = True  # Header and body are two packets; with Nagle the second would wait for an ACK.
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

    def do_HEAD(self) -> None:
        self.send_error(404)  # No object is named like the prefix.

    def log_message(self, *_: object) -> None:
        """Logs nothing; one line per page would be useless."""


def _serve(connection: "Connection[int, None]") -> None:
    server = _HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection.send(server.server_port)
    with contextlib.suppress(EOFError):  # The parent has ended.
        while True:
            connection.recv()
            connection.send(server.pages)


def _server_keys_per_s(server: Server, keys: int) -> float:
    """Speed of the server for a client that does not parse the pages."""
    began = time.perf_counter()
    client = http.client.HTTPConnection(server.endpoint.removeprefix("http://"))
    for number in range(0, keys, PAGE_KEYS):
        client.request("GET", f"/{bucket_of(keys)}?list-type=2&prefix=images/&continuation-token={number}")
        client.getresponse().read()
    client.close()
    return keys / (time.perf_counter() - began)
