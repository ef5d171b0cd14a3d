"""The benchmark of listing: its bucket answers as S3 does, and what it measures at a small size adds up."""

from pathlib import Path
from typing import Any

import boto3
import pytest
from harness import Recorder, s3_client

from benchmarks import listing
from benchmarks.listing import ListingBenchmark, Server, etag_of, key_of, running_server, size_of
from mnist_dist.errors import ConfigError, MnistDistError
from mnist_dist.scoring.generations import Output
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.s3_pages import take_objects
from mnist_dist.store.uris import join

KEYS = 2_345
BUCKET = listing.bucket_of(KEYS)


@pytest.fixture(scope="module")
def server() -> Any:
    with running_server() as running:
        yield running


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """botocore as it is; `storage` lists from the same server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "benchmark")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    ANYWHERE.forget_clients()
    yield boto3.session.Session().client("s3")
    ANYWHERE.forget_clients()


# --- the bucket ------------------------------------------------------------------------------------------------------


def test_the_bucket_is_read_page_by_page(client: Any, server: Server) -> None:
    before = server.pages()
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="images/"))
    assert server.pages() - before == 3
    assert [len(page["Contents"]) for page in pages] == [1_000, 1_000, 345]
    found = [(item["Key"], item["Size"], item["ETag"]) for page in pages for item in page["Contents"]]
    assert found == [(key_of(number), size_of(number), f'"{etag_of(number)}"') for number in range(KEYS)]
    assert [item[0] for item in found] == sorted({item[0] for item in found})


def test_the_bucket_knows_prefixes_and_folders(client: Any) -> None:
    level = client.list_objects_v2(Bucket=BUCKET, Prefix="images/", Delimiter="/")
    assert [item["Prefix"] for item in level["CommonPrefixes"]] == [f"images/{folder:07d}/" for folder in range(3)]
    assert "Contents" not in level
    folder = client.list_objects_v2(Bucket=BUCKET, Prefix="images/0000002/", Delimiter="/", MaxKeys=7)
    assert [item["Key"] for item in folder["Contents"]] == [key_of(number) for number in range(2_000, 2_007)]
    assert folder["IsTruncated"]
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="photos/")["KeyCount"] == 0


def test_the_bucket_has_no_objects_to_read(client: Any) -> None:
    with pytest.raises(client.exceptions.ClientError, match="404"):
        client.get_object(Bucket=BUCKET, Key=key_of(0))


def test_what_is_listed_is_in_the_bucket(client: Any) -> None:
    entries = list(ANYWHERE.scan_entries(f"s3://{BUCKET}/images"))
    assert entries == [
        Entry(f"s3://{BUCKET}/{key_of(number)}", size_of(number), etag_of(number)) for number in range(KEYS)
    ]
    level = ANYWHERE.list_level(f"s3://{BUCKET}/images/0000002")
    assert sorted(level.files) == [Path(key_of(number)).name for number in range(2_000, KEYS)]


# --- pages of a listing, by our parser and by botocore's -------------------------------------------------------------


def page_of(*items: str) -> bytes:
    xmlns = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    return f"<ListBucketResult {xmlns}><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>".encode()


def object_of(key: str, *, more: str = "", time: str = "2026-01-31T12:00:00.000Z") -> str:
    last = f"<LastModified>{time}</LastModified><ETag>&quot;e&quot;</ETag><Size>3</Size>"
    return f"<Contents>{more}<Key>{key}</Key>{last}</Contents>\n"


def taken(body: bytes, *, status: int = 200) -> tuple[dict[str, Any], bytes]:
    """What is known of a page before botocore parses it, and what is left of it."""
    response, known = {"body": body, "status_code": status}, dict[str, Any]()
    take_objects(response_dict=response, customized_response_dict=known, operation_model=None)
    return known, response["body"]  # type: ignore[return-value]  # of two types of values


def test_the_objects_are_taken_out_of_a_page() -> None:
    owner = "<Owner><ID>7</ID><DisplayName>a &amp; b</DisplayName></Owner>"
    known, left = taken(page_of(object_of("a%20b"), object_of("&lt;c&amp;d&gt;ä", more=owner)))
    assert [(item["Key"], item["ETag"], item["Size"]) for item in known["Contents"]] == [
        ("a%20b", '"e"', 3),
        ("<c&d>ä", '"e"', 3),
    ]
    assert known["Contents"][0]["LastModified"].isoformat() == "2026-01-31T12:00:00+00:00"
    assert left == page_of("\n")


@pytest.mark.parametrize(
    "body",
    [
        page_of(),
        page_of(object_of("a"), "<CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes>", object_of("c")),
        page_of("<Contents><Key>a</Key></Contents>"),
        page_of(object_of("a", time="yesterday")),
        page_of(object_of("a&nbsp;b")),
        page_of(object_of("a"))[:-60],
    ],
)
def test_a_page_that_looks_otherwise_is_left_to_botocore(body: bytes) -> None:
    assert taken(body) == ({}, body)


def test_an_error_is_left_to_botocore() -> None:
    body = page_of(object_of("a"))
    assert taken(body, status=503) == ({}, body)


def test_a_page_of_a_real_server_is_the_same_by_both_parsers(s3: str) -> None:
    names = ["plain.jpg", "a b+c%20d.jpg", "ä/ß & <é>'\".jpg", "deep/er/x.png", "deep/y.png"]
    for name in names:
        ANYWHERE.write_bytes(join(s3, name), name.encode())
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    for delimiter in ("", "/"):
        asked = {"Bucket": bucket, "Prefix": f"{prefix}/", "Delimiter": delimiter}
        theirs = boto3.session.Session().client("s3").list_objects_v2(**asked)
        ours = s3_client().list_objects_v2(**asked)
        used = ("Key", "ETag", "Size", "LastModified")
        assert ours["Contents"] == [{name: item[name] for name in used} for item in theirs["Contents"]]
        assert ours.get("CommonPrefixes") == theirs.get("CommonPrefixes")
        assert len(ours["Contents"]) == (1 if delimiter else len(names)) + bool(delimiter)


# --- the measurements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cases": ()}, r"^cases must be among listing, resume, incremental"),
        ({"keys": 4}, r"^keys must be at least 5\. Received: keys=4"),
        ({"rows": 2_559}, r"^rows must be at least 2560\. Received: rows=2559"),
        ({"rounds": 0}, r"^rounds must be at least 1\. Received: rounds=0"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ListingBenchmark(**fields)


def test_a_resume_plans_the_shards_that_are_not_there(tmp_path: Path) -> None:
    written = listing.write_unfinished(str(tmp_path), 5_432)
    found = listing.plan_resume(str(tmp_path))
    assert (found["rows"], found["shards"], found["shards_left"]) == (5_432, 22, 2)
    assert found["rows_left"] == written["rows_left"] == 2 * 247
    generation = Output(str(tmp_path)).unfinished()
    assert generation is not None
    assert sorted(set(range(22)) - generation.done_shards()) == [9, 19]


def test_what_is_new_or_changed_is_found_in_a_listing(tmp_path: Path) -> None:
    listing.write_committed(str(tmp_path), 3_000)
    found = listing.find_new(str(tmp_path), 3_000)
    assert found["new"] == 300
    assert 0 < found["listing_bytes"] <= found["peak_bytes"]


def test_a_measurement_that_lacks_something_does_not_count() -> None:
    with pytest.raises(MnistDistError, match=r"^20,000 keys of the bucket are listed\. Received: 19,000"):
        listing._check(20_000, 19_000, "keys of the bucket are listed")


@pytest.mark.slow
def test_a_small_measurement_counts_everything() -> None:
    shown = Recorder()
    result = listing.measure(ListingBenchmark(keys=20_000, rows=100_000, rounds=1), console=shown)
    listed = result["listing"]
    assert [(listed[name]["keys"], listed[name]["pages"]) for name in ("part", "all")] == [(4_000, 4), (20_000, 20)]
    assert listed["keys_per_s"] == 20_000 / listed["all"]["seconds"] < listed["server_keys_per_s"]
    assert 80 < listed["column_bytes_per_key"] < 120
    resume = result["resume"]
    assert (resume["rows"], resume["shards"], resume["shards_left"]) == (100_000, 65, 6)
    assert 9_000 < resume["rows_left"] < 9_300
    assert result["incremental"]["new"] == 10_000
    titles, *rows = listing.table(result)
    assert [len(row) for row in rows] == [len(titles)] * 6
    assert rows[1][0] == "list 20,000 keys"
    assert rows[3][4] == f"{resume['rows_left']:,} left in 6 of 65 shards"
