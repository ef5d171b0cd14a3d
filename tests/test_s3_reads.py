"""Quick reads of S3: the same bytes as botocore's from a real server, and whatever fails left to botocore."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from harness import fast_reads, s3_client

from mnist_dist.config import StoreConfig
from mnist_dist.store import s3_reads
from mnist_dist.store.anywhere import ANYWHERE, store_for
from mnist_dist.store.s3_reads import FAILURES_IN_A_ROW, PAUSE_S, FastReads

BODY = bytes(range(256)) * 40
ETAG = "of-this-body"
PIECE_BYTES = 65_536
ODD_NAMES = [
    *(
        "plain.png",
        "a b",
        "a%20b",
        "a+b",
        "a%2Bb",
        "a?b",
        "a%3Fb",
        "a#b",
        "a%23b",
        "a&b",
        "a~b",
        "a%7Eb",
        "a*b",
        "a%2Ab",
    ),
    *(
        "a\\b",
        "a%5Cb",
        "a\"b'c",
        "a%22b",
        "größe",
        "gro\u0308ße",
        "gr%C3%B6ße",
        "日本語",
        "🙂",
        "%",
        "%%",
        "a%2Fb",
        "a%zz",
    ),
    *(
        "a=b",
        "a;b",
        "a:b",
        "a@b",
        "a,b",
        "a$b",
        "a!b",
        "a(b)",
        "a[b]",
        "a{b}",
        "a|b",
        "a^b",
        "a`b",
        "a<b>",
        " a ",
        "...",
    ),
    *(".hidden", "x?versionId=1", "x?partNumber=1&b=2"),
]


def place(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def quick(uri: str, *, max_bytes: int = 1_000_000) -> tuple[int, str, bytes | None] | None:
    found: tuple[int, str, bytes | None] | None = fast_reads().read(*place(uri), max_bytes=max_bytes)
    return found


# --- the same as botocore's, from a real server ----------------------------------------------------------------------


@pytest.fixture
def by_botocore(s3_server: str) -> Iterator[list[str]]:
    """What botocore was asked for, of new clients: each path of a GET of an object."""
    ANYWHERE.forget_clients()
    asked = list[str]()
    events = s3_client().meta.events
    events.register("before-send.s3.GetObject", lambda request, **_: asked.append(request.url))
    yield asked
    ANYWHERE.forget_clients()


@pytest.mark.parametrize("size_bytes", [0, 1, 10_000, 3_000_000])
def test_an_object_is_the_one_that_botocore_reads(s3: str, by_botocore: list[str], size_bytes: int) -> None:
    uri = f"{s3}/deep/er/a.bin"
    ANYWHERE.write_bytes(uri, (BODY * (size_bytes // len(BODY) + 1))[:size_bytes])
    entry, data = ANYWHERE.read_object(uri, max_bytes=size_bytes)
    assert ANYWHERE.read_bytes(uri) == data
    assert by_botocore == []
    bucket, key = place(uri)
    answer = s3_client().get_object(Bucket=bucket, Key=key)
    assert len(by_botocore) == 1
    assert (entry.uri, entry.size_bytes, entry.etag) == (uri, answer["ContentLength"], answer["ETag"].strip('"'))
    assert data == answer["Body"].read()


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, len(BODY)), (4_001, 99), (10_000, 240), (10_000, 241), (10_239, 5_000)]
)
def test_a_range_is_the_one_that_botocore_reads(s3: str, by_botocore: list[str], start: int, length: int) -> None:
    uri = f"{s3}/a.bin"
    ANYWHERE.write_bytes(uri, BODY)
    found = ANYWHERE.read_range(uri, start, length)
    assert by_botocore == []
    bucket, key = place(uri)
    answer = s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
    assert found == answer["Body"].read() == BODY[start : start + length]


@pytest.mark.parametrize("start", [len(BODY), len(BODY) + 7])
def test_a_range_after_the_end_is_empty(s3: str, by_botocore: list[str], start: int) -> None:
    uri = f"{s3}/a.bin"
    ANYWHERE.write_bytes(uri, BODY)
    assert fast_reads().read_range(*place(uri), start, start + 5) is None
    assert ANYWHERE.read_range(uri, start, 5) == b""
    assert len(by_botocore) == 1


def test_an_encoded_object_stays_encoded(s3: str, by_botocore: list[str]) -> None:
    bucket, key = place(f"{s3}/a.gz")
    s3_client().put_object(Bucket=bucket, Key=key, Body=b"not even gzip", ContentEncoding="gzip")
    assert ANYWHERE.read_bytes(f"{s3}/a.gz") == b"not even gzip"
    assert by_botocore == []


def test_odd_keys_are_told_apart(s3: str, by_botocore: list[str]) -> None:
    keys = [f"{s3}/files/{name}" for name in ODD_NAMES] + [f"{s3}/folders/{name}/x" for name in ODD_NAMES]
    for uri in keys:
        ANYWHERE.write_bytes(uri, uri.encode())
    reads = fast_reads()
    for uri in keys:
        size, _, data = reads.read(*place(uri), max_bytes=9_999) or (None, None, None)
        assert (uri, size, data) == (uri, len(uri.encode()), uri.encode())
        assert (uri, reads.read_range(*place(uri), 0, 9_999)) == (uri, uri.encode())
    assert by_botocore == []


def test_a_missing_object_is_file_not_found_and_no_failure(s3: str, by_botocore: list[str]) -> None:
    ANYWHERE.write_bytes(f"{s3}/there", BODY)
    for number in range(2 * FAILURES_IN_A_ROW):
        with pytest.raises(FileNotFoundError, match="no such object"):
            ANYWHERE.read_bytes(f"{s3}/missing{number}")
        with pytest.raises(FileNotFoundError, match="no such object"):
            ANYWHERE.read_range(f"{s3}/missing{number}", 1, 2)
    by_botocore.clear()
    assert ANYWHERE.read_bytes(f"{s3}/there") == BODY
    assert by_botocore == []


def test_many_threads_read_their_own_bytes(s3: str, by_botocore: list[str]) -> None:
    expected = {f"{s3}/{number}": bytes([number]) * (1_000 + 5_000 * number) for number in range(24)}
    for uri, data in expected.items():
        ANYWHERE.write_bytes(uri, data)
    start = threading.Barrier(8)

    def read_all(first: int) -> None:
        start.wait()
        uris = list(expected)
        for uri in uris[first:] + uris[:first]:
            entry, data = ANYWHERE.read_object(uri, max_bytes=1_000_000)
            assert (entry.size_bytes, data) == (len(expected[uri]), expected[uri])
            assert ANYWHERE.read_range(uri, 500, 700) == expected[uri][500:1_200]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_all, range(8)))
    assert by_botocore == []


# --- a server of our own, which fails as it is told ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a GET is answered with."""

    status: int = 200
    body: bytes = BODY
    sent_bytes: int | None = None
    """Of the body, before the connection is closed; none: all."""
    is_silent: bool = False
    """Nothing is sent until the server is closed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One GET that came."""

    path: str
    is_quick: bool
    """It was not botocore that asked."""
    authorization: str
    token: str | None
    payer: str | None


class Server(ThreadingHTTPServer):
    """One object below every path."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.to_quick, self.to_botocore = Answer(), Answer()
        self.asked = list[Asked]()
        self.connections, self.sent_bytes = 0, 0
        self.is_sent, self.is_closed = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def by(self, *, is_quick: bool) -> int:
        return sum(asked.is_quick == is_quick for asked in self.asked)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what some tests are about


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart
    server: Server

    def do_GET(self) -> None:
        headers = self.headers
        is_quick = "Botocore" not in headers["User-Agent"]
        token = headers.get("X-Amz-Security-Token")
        self.server.asked.append(
            Asked(
                path=self.path,
                is_quick=is_quick,
                authorization=headers.get("Authorization", ""),
                token=token,
                payer=headers.get("x-amz-request-payer"),
            )
        )
        self._say(self.server.to_quick if is_quick else self.server.to_botocore)

    def _say(self, answer: Answer) -> None:
        if answer.is_silent:
            self.server.is_closed.wait()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("ETag", f'"{ETAG}"')
        self.end_headers()
        end = len(answer.body) if answer.sent_bytes is None else answer.sent_bytes
        self.close_connection = answer.sent_bytes is not None
        try:
            for start in range(0, end, PIECE_BYTES):
                self.wfile.write(answer.body[start : min(start + PIECE_BYTES, end)])
                self.server.sent_bytes += PIECE_BYTES
        finally:
            self.server.is_sent.set()

    def log_message(self, *_: object) -> None:
        pass


def running() -> Server:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The endpoint of `storage`."""
    one = running()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {"AWS_ENDPOINT_URL": one.url, "AWS_ACCESS_KEY_ID": "first", "AWS_SECRET_ACCESS_KEY": "secret"}
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in {**settings, **nowhere, "AWS_DEFAULT_REGION": "eu-central-1"}.items():
        monkeypatch.setenv(name, value)
    ANYWHERE.forget_clients()
    yield one
    ANYWHERE.forget_clients()
    one.is_closed.set()
    one.shutdown()
    one.server_close()


URI = "s3://bucket/a/key"
FAULTS = {
    "unavailable": Answer(status=503, body=b"<Error><Code>SlowDown</Code></Error>"),
    "denied": Answer(status=403, body=b"<Error><Code>AccessDenied</Code></Error>"),
    "redirected": Answer(status=301, body=b"<Error><Code>PermanentRedirect</Code></Error>"),
    "broken": Answer(sent_bytes=5_000),
    "closed": Answer(sent_bytes=0),
}
fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


@fault
def test_what_fails_is_read_by_botocore_and_whole(server: Server, fault: Answer) -> None:
    server.to_quick = fault
    entry, data = ANYWHERE.read_object(URI, max_bytes=len(BODY))
    assert (entry.size_bytes, entry.etag, data) == (len(BODY), ETAG, BODY)
    assert ANYWHERE.read_bytes(URI) == BODY
    assert (server.by(is_quick=True), server.by(is_quick=False)) == (2, 2)


def test_an_error_is_the_one_that_botocore_is_told(server: Server) -> None:
    server.to_quick, server.to_botocore = FAULTS["unavailable"], FAULTS["denied"]
    with pytest.raises(PermissionError, match="AccessDenied"):
        ANYWHERE.read_bytes(URI)
    with pytest.raises(PermissionError, match="AccessDenied"):
        ANYWHERE.read_range(URI, 3, 4)


def test_a_whole_object_is_no_range(server: Server) -> None:
    """A server that knows no ranges sends everything."""
    assert fast_reads().read_range("bucket", "a/key", 100, 200) is None


@dataclass
class Clock:
    now_s: float = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(s3_reads, "time", one)
    return one


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"denied"}))
def test_failures_in_a_row_leave_the_bucket_to_botocore_for_a_while(server: Server, clock: Clock, fault: str) -> None:
    server.to_quick = FAULTS[fault]
    for _ in range(FAILURES_IN_A_ROW):
        assert quick(URI) is None
    server.to_quick = Answer()
    asked = server.by(is_quick=True)
    assert asked == FAILURES_IN_A_ROW
    clock.now_s += PAUSE_S - 1
    assert ANYWHERE.read_bytes(URI) == BODY
    assert (server.by(is_quick=True), server.by(is_quick=False)) == (asked, 1)
    assert quick("s3://another-bucket/key") == (len(BODY), ETAG, BODY)
    clock.now_s += 2
    assert quick(URI) == (len(BODY), ETAG, BODY)
    assert server.by(is_quick=False) == 1


def test_objects_that_may_not_be_read_are_no_failures(server: Server) -> None:
    server.to_quick = FAULTS["denied"]
    for _ in range(2 * FAILURES_IN_A_ROW):
        assert quick(URI) is None
    server.to_quick = Answer()
    assert quick(URI) == (len(BODY), ETAG, BODY)


def test_after_a_pause_as_many_failures_are_needed_again(server: Server, clock: Clock) -> None:
    server.to_quick = FAULTS["unavailable"]
    for _ in range(2):
        for _ in range(FAILURES_IN_A_ROW + 3):
            assert quick(URI) is None
        clock.now_s += PAUSE_S + 1
    assert server.by(is_quick=True) == 2 * FAILURES_IN_A_ROW


def test_a_success_in_between_sets_the_count_back(server: Server) -> None:
    for _ in range(3):
        server.to_quick = FAULTS["unavailable"]
        for _ in range(FAILURES_IN_A_ROW - 1):
            assert quick(URI) is None
        server.to_quick = Answer()
        assert quick(URI) == (len(BODY), ETAG, BODY)


def test_of_a_larger_object_the_body_is_not_transferred(server: Server) -> None:
    body = bytes(64 * 1024 * 1024)
    server.to_quick = Answer(body=body)
    entry, data = ANYWHERE.read_object(URI, max_bytes=len(body) - 1)
    assert (entry.size_bytes, entry.etag, data) == (len(body), ETAG, None)
    assert server.is_sent.wait(30)
    assert server.sent_bytes < len(body) / 2  # what the sockets hold
    assert server.by(is_quick=False) == 0


def test_a_server_that_says_nothing_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_reads, "SILENCE_S", 1)
    server.to_quick = Answer(is_silent=True)
    assert quick(URI) is None
    assert ANYWHERE.read_bytes(URI) == BODY


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", ".", "..", "a/.", "a/./b", "../a", "a/../b"])
def test_a_key_that_is_no_path_is_left_to_botocore(server: Server, key: str) -> None:
    reads = fast_reads()
    assert reads.read("bucket", key, max_bytes=10) is None
    assert reads.read_range("bucket", key, 0, 10) is None
    assert server.asked == []
    if key:
        assert ANYWHERE.read_bytes(f"s3://bucket/{key}") == BODY
        assert [(asked.path, asked.is_quick) for asked in server.asked] == [(f"/bucket/{key}", False)]


@pytest.mark.parametrize("bucket", [".", "..", "x#y", "x?y", "x y", "x%20y", "ü", "x\\..\\y"])
def test_a_bucket_that_is_none_is_left_to_botocore(server: Server, bucket: str) -> None:
    assert fast_reads().read(bucket, "bucket/key", max_bytes=10) is None
    assert server.asked == []


def test_forgotten_clients_are_made_anew(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    other = running()
    other.to_quick = Answer(body=b"from the other")
    monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
    try:
        ANYWHERE.forget_clients()
        assert ANYWHERE.read_bytes(URI) == b"from the other"
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert ANYWHERE.read_bytes(URI) == b"from the other"
        ANYWHERE.forget_clients()
        assert ANYWHERE.read_bytes(URI) == BODY
    finally:
        other.shutdown()
        other.server_close()
    assert (server.by(is_quick=True), server.by(is_quick=False)) == (1, 0)


FORKED = """
import os, signal, sys
from mnist_dist.store.anywhere import ANYWHERE
before = ANYWHERE.read_bytes("s3://bucket/a/key")
child = os.fork()
if not child:
    signal.alarm(30)  # its default ends the process, even one that hangs
    os._exit(0 if ANYWHERE.read_bytes("s3://bucket/a/key") == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_fork_reads_too(server: Server) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], check=False)
    assert done.returncode == 0


# --- credentials and settings ----------------------------------------------------------------------------------------


@dataclass
class Session:
    """As much of boto3's session as is asked."""

    access_key: str | None = "first"
    token: str | None = None
    looks: int = 0
    error: Exception | None = None

    def get_credentials(self) -> "Session | None":
        return None if self.access_key is None else self

    def get_frozen_credentials(self) -> Any:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(access_key=self.access_key, secret_key="secret", token=self.token)


def reads_of(session: Session, endpoint: str) -> FastReads:
    return FastReads(session, SimpleNamespace(meta=SimpleNamespace(endpoint_url=endpoint, region_name="eu-central-1")))


def read_until(reads: FastReads, is_so: Callable[[], bool]) -> None:
    while not is_so():
        assert reads.read("bucket", "key", max_bytes=99_999) is not None
        time.sleep(0.1)


def test_credentials_are_kept_from_read_to_read(server: Server) -> None:
    session = Session(token="first token")
    reads = reads_of(session, server.url)
    for _ in range(3):
        reads.read("bucket", "key", max_bytes=99_999)
    assert session.looks == 1
    assert "Credential=first/" in server.asked[-1].authorization
    assert "/eu-central-1/s3/" in server.asked[-1].authorization
    assert server.asked[-1].token == "first token"


def test_credentials_that_change_are_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_reads, "CREDENTIALS_S", 300)  # asked for again when five minutes are left of it
    session = Session(token="first token")
    reads = reads_of(session, server.url)
    reads.read("bucket", "key", max_bytes=99_999)
    assert server.asked[-1].token == "first token"
    session.access_key, session.token = "second", None
    read_until(reads, lambda: "Credential=second/" in server.asked[-1].authorization)
    assert server.asked[-1].token is None


def test_credentials_are_asked_for_again_within_a_minute_or_so() -> None:
    assert 300 < s3_reads.CREDENTIALS_S <= 420  # five minutes are obstore's


def test_a_token_of_the_session_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the session")
    assert ANYWHERE.read_bytes(URI) == BODY
    assert [(asked.is_quick, asked.token) for asked in server.asked] == [(True, "of the session")]


def test_credentials_that_cannot_be_had_are_a_failure(server: Server) -> None:
    session = Session(error=RuntimeError("the metadata service is gone"))
    reads = reads_of(session, server.url)
    assert reads.read("bucket", "key", max_bytes=10) is None
    assert server.asked == []
    session.error = None
    read_until(reads, lambda: len(server.asked) > 0)


def test_without_credentials_nothing_is_asked(server: Server) -> None:
    reads = reads_of(Session(access_key=None), server.url)
    assert reads.read("bucket", "key", max_bytes=10) is None
    assert reads.read_range("bucket", "key", 0, 10) is None
    assert server.connections == 0


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_certificates_of_ones_own_are_left_to_botocore(
    server: Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/certificates.pem")
    encrypted = reads_of(Session(), server.url.replace("http://", "https://"))
    assert encrypted.read("bucket", "key", max_bytes=10) is None
    assert server.connections == 0
    assert reads_of(Session(), server.url).read("bucket", "key", max_bytes=99_999) == (len(BODY), ETAG, BODY)


@pytest.mark.parametrize(
    "settings",
    [
        {"AWS_ENDPOINT": "http://127.0.0.1:9"},
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
        {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"},
        {"AWS_SKIP_SIGNATURE": "true"},
        {"AWS_S3_EXPRESS": "true"},
        {"AWS_REQUEST_PAYER": "somebody"},
        {"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "us-west-2"},
        {"AWS_ACCESS_KEY_ID": "another", "AWS_SESSION_TOKEN": "another", "AWS_TOKEN": "another"},
        {"AWS_BUCKET": "another", "AWS_BUCKET_NAME": "another"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_variables_that_only_obstore_knows_change_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    reads = reads_of(Session(), server.url)
    assert reads.read("bucket", "key", max_bytes=99_999) == (len(BODY), ETAG, BODY)
    assert [(asked.path, asked.token) for asked in server.asked] == [("/bucket/key", None)]
    assert "Credential=first/" in server.asked[0].authorization
    assert "/eu-central-1/s3/" in server.asked[0].authorization


@pytest.mark.parametrize("variable", ["AWS_CONDITIONAL_PUT", "AWS_CHECKSUM_ALGORITHM", "AWS_DISABLE_TAGGING"])
def test_a_variable_that_obstore_refuses_leaves_the_bucket_to_botocore(
    server: Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "something else")
    assert ANYWHERE.read_bytes(URI) == BODY
    assert server.by(is_quick=False) == 1


# --- public buckets, and buckets whose readers pay -------------------------------------------------------------------


@pytest.mark.parametrize("is_quick", [True, False])
def test_an_anonymous_store_signs_nothing(server: Server, is_quick: bool) -> None:
    server.to_quick = Answer(status=200 if is_quick else 503)
    store = store_for(StoreConfig(s3_anonymous=True))
    store.forget_clients()
    assert store.read_bytes(URI) == BODY
    assert (server.asked[-1].is_quick, server.asked[-1].authorization) == (is_quick, "")
    assert store.read_range(URI, 0, len(BODY)) == BODY
    assert {asked.authorization for asked in server.asked} == {""}


def test_an_anonymous_store_needs_no_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = store_for(StoreConfig(s3_anonymous=True))
    store.forget_clients()
    assert store.read_bytes(URI) == BODY
    assert [asked.is_quick for asked in server.asked] == [True]


@pytest.mark.parametrize("is_quick", [True, False])
def test_a_requester_says_so_in_each_request_and_signs_it(server: Server, is_quick: bool) -> None:
    server.to_quick = Answer(status=200 if is_quick else 503)
    store = store_for(StoreConfig(s3_requester_pays=True))
    store.forget_clients()
    assert store.read_object(URI, max_bytes=len(BODY))[1] == BODY
    assert store.read_range(URI, 0, len(BODY)) == BODY
    assert {asked.payer for asked in server.asked} == {"requester"}
    assert all("x-amz-request-payer" in asked.authorization for asked in server.asked)
    assert any(asked.is_quick == is_quick for asked in server.asked)


def test_a_requester_says_so_also_where_nothing_is_read(s3: str) -> None:
    store = store_for(StoreConfig(s3_requester_pays=True))
    store.forget_clients()
    sent = list[tuple[str, bytes]]()
    events = store.of(s3)._client.meta.events  # type: ignore[attr-defined]
    events.register(
        "before-send.s3", lambda request, **_: sent.append((request.method, request.headers["x-amz-request-payer"]))
    )
    ANYWHERE.write_bytes(f"{s3}/a", BODY)
    assert store.entry_of(f"{s3}/a").size_bytes == len(BODY)
    assert [entry.uri for entry in store.list_entries(s3)] == [f"{s3}/a"]
    assert {method for method, _ in sent} == {"HEAD", "GET"}
    assert {payer for _, payer in sent} == {b"requester"}


def test_by_default_nobody_else_pays(server: Server) -> None:
    ANYWHERE.read_bytes(URI)
    assert [(asked.payer, bool(asked.authorization)) for asked in server.asked] == [(None, True)]
