"""The store of web servers: what it reads, from servers good and bad, and what it asks of no host."""

import base64
import errno
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from urllib3.util.connection import create_connection
from web import MODIFIED, MODIFIED_S, Page, WebServer, running_web_server

from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store import public_hosts
from mnist_dist.store.https import HttpsStore
from mnist_dist.store.public_hosts import is_public
from mnist_dist.store.web_requests import FAILURES_IN_A_ROW, MAX_REDIRECTS, NETWORK_S, Patience

BODY = bytes(range(256)) * 40
SECRET = "X-Amz-Signature=5ec2e7"


@dataclass
class Clock:
    """Time that passes only in waits."""

    now_s: float = 1_000.0
    waits: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        self.now_s += wait_s


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with running_web_server() as one:
        yield one


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> HttpsStore:
    return HttpsStore(allow_private_hosts=True, sleep=clock.sleep, now=clock.now)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where every connection is refused: it is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        yield int(taken.getsockname()[1])


READS: dict[str, Callable[[HttpsStore, str], object]] = {
    "object": lambda store, uri: store.read_object(uri, max_bytes=len(BODY)),
    "bytes": lambda store, uri: store.read_bytes(uri),
    "range": lambda store, uri: store.read_range(uri, 3, 4),
    "entry": lambda store, uri: store.entry_of(uri),
    "open": lambda store, uri: store.open_binary(uri),
}
each_read = pytest.mark.parametrize("read", READS.values(), ids=READS)


# --- whole objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells_length", [True, False])
def test_an_object_is_read_with_its_entry(server: WebServer, store: HttpsStore, tells_length: bool) -> None:
    uri = server.put("/a.png", data=BODY, tells_length=tells_length)
    entry, data = store.read_object(uri, max_bytes=len(BODY))
    assert (entry.uri, entry.size_bytes, entry.etag, data) == (uri, len(BODY), "tag", BODY)
    assert store.read_bytes(uri) == BODY
    assert store.entry_of(uri) == entry
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_a_larger_object_is_not_read(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a.png", data=BODY, sent_bytes=0)  # reading it would fail
    entry, data = store.read_object(uri, max_bytes=len(BODY) - 1)
    assert (entry.size_bytes, data) == (len(BODY), None)


def test_reading_stops_at_max_bytes_where_no_length_is_told(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a.png", data=BODY * 5_000, tells_length=False)  # 51 MB
    entry, data = store.read_object(uri, max_bytes=1_000)
    assert (entry.size_bytes, data) == (1_001, None)
    assert server.sent.acquire()
    assert store.read_bytes(server.put("/b", data=b"b")) == b"b"


def test_an_empty_object_is_an_object(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/empty", data=b"", head_status=405)
    assert store.read_object(uri, max_bytes=0)[1] == b""
    assert store.entry_of(uri).size_bytes == 0
    assert store.read_range(uri, 0, 5) == b""
    with store.open_binary(uri) as file:
        assert file.read() == b""


def test_a_body_that_breaks_off_is_read_again(server: WebServer, store: HttpsStore, clock: Clock) -> None:
    uri = server.put("/a", Page(data=BODY, sent_bytes=5_000), Page(data=BODY, sent_bytes=0), Page(data=BODY))
    assert store.read_bytes(uri) == BODY
    assert len(clock.waits) == 2


def test_a_body_that_always_breaks_off_is_an_error_of_the_object(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a", data=BODY, sent_bytes=5_000)
    with pytest.raises(OSError, match=r"the connection broke off.*/a'"):
        store.read_bytes(uri)
    assert len(server.asked) == Patience().attempts


def test_bytes_beyond_the_length_belong_to_no_object(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a", data=b"abc", extra=b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz")
    assert [store.read_bytes(uri) for _ in range(3)] == [b"abc"] * 3


@each_read
def test_a_compressed_body_is_refused(
    server: WebServer, store: HttpsStore, read: Callable[[HttpsStore, str], object]
) -> None:
    uri = server.put("/a", data=BODY, headers={"Content-Encoding": "gzip"})
    with pytest.raises(OSError, match=r"compresses the file .*\(Content-Encoding: gzip\).*/a'"):
        read(store, uri)


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(
    ("start", "length", "found"),
    [(0, 3, b"abc"), (4, 9, b"ef"), (2, 0, b""), (6, 1, b""), (9, 2, b""), (0, 6, b"abcdef"), (2, 1, b"c")],
)
def test_a_range_ends_where_the_object_ends(
    server: WebServer, store: HttpsStore, has_ranges: bool, start: int, length: int, found: bytes
) -> None:
    assert store.read_range(server.put("/a", data=b"abcdef", has_ranges=has_ranges), start, length) == found


def test_a_range_of_a_server_without_ranges_is_read_no_further_than_its_end(
    server: WebServer, store: HttpsStore
) -> None:
    uri = server.put("/a", data=BODY, has_ranges=False, sent_bytes=300)  # the rest never comes
    assert store.read_range(uri, 250, 20) == BODY[250:270]


@pytest.mark.parametrize("content_range", ["bytes 5-6/10240", "bytes 3-9/10240", "bytes 3-4/10240", "items 3-6/9"])
def test_another_range_than_the_one_asked_for_is_refused(
    server: WebServer, store: HttpsStore, content_range: str
) -> None:
    uri = server.put("/a", data=BODY, headers={"Content-Range": content_range})
    with pytest.raises(OSError, match=r"a(nother)? part of the file"):
        store.read_range(uri, 3, 4)


def test_a_range_with_too_few_bytes_is_refused(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a", data=b"abc", status=206, headers={"Content-Range": "bytes 3-6/9"})
    with pytest.raises(OSError, match="fewer bytes than it says"):
        store.read_range(uri, 3, 4)


@pytest.mark.parametrize("fields", [{}, {"has_ranges": False}, {"tells_length": False}, {"head_status": 403}], ids=str)
def test_a_file_is_opened_whatever_the_server_can_do(
    server: WebServer, store: HttpsStore, fields: dict[str, Any]
) -> None:
    data = os.urandom(3_000_017)
    with store.open_binary(server.put("/big.tar", data=data, **fields)) as file:
        assert file.seek(-17, os.SEEK_END) == 3_000_000
        assert file.read() == data[-17:]
        file.seek(1_234_567)
        assert file.read(1_500_000) == data[1_234_567:2_734_567]


def test_a_file_of_a_server_with_ranges_is_not_read_whole(server: WebServer, store: HttpsStore) -> None:
    with store.open_binary(server.put("/big.tar", data=BODY * 400)) as file:  # 4 MB
        file.seek(2_000_000)
        assert file.read(3) == (BODY * 400)[2_000_000:2_000_003]
    assert all(asked.method == "HEAD" or "Range" in asked.headers for asked in server.asked)


def test_a_download_appears_whole_after_a_broken_one(server: WebServer, store: HttpsStore, tmp_path: Path) -> None:
    uri = server.put(f"/w.weights.h5?{SECRET}", Page(data=BODY, sent_bytes=7_000), Page(data=BODY[3:99]))
    path = store.local_path(uri, tmp_path)
    assert (path.name, path.read_bytes()) == ("w.weights.h5", BODY[3:99])


# --- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_status", [401, 403, 405, 501])
@pytest.mark.parametrize("fields", [{}, {"has_ranges": False}, {"tells_length": False, "has_ranges": False}], ids=str)
def test_an_entry_is_had_without_head(
    server: WebServer, store: HttpsStore, head_status: int, fields: dict[str, Any]
) -> None:
    uri = server.put("/a", data=BODY, head_status=head_status, **fields)
    assert (store.entry_of(uri).size_bytes, store.entry_of(uri).etag) == (len(BODY), "tag")
    assert store.exists(uri)


@pytest.mark.parametrize(
    ("headers", "etag"),
    [
        ({"ETag": '"a-1"'}, "a-1"),
        ({"ETag": 'W/"a-1"'}, "a-1"),
        ({"ETag": "", "Last-Modified": MODIFIED}, f"{MODIFIED_S}-{len(BODY)}"),
        ({"ETag": "", "Last-Modified": "yesterday"}, f"0-{len(BODY)}"),
        ({"ETag": ""}, f"0-{len(BODY)}"),
    ],
)
def test_an_etag_is_the_servers_or_time_and_size(
    server: WebServer, store: HttpsStore, headers: dict[str, str], etag: str
) -> None:
    uri = server.put("/a", data=BODY, headers=headers)
    assert store.entry_of(uri).etag == store.read_object(uri, max_bytes=len(BODY))[0].etag == etag


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (404, FileNotFoundError, "no such object"),
        (410, FileNotFoundError, "no such object"),
        (401, PermissionError, r"access denied \(401\)"),
        (403, PermissionError, r"access denied \(403\)"),
        (400, OSError, "the server answers 400"),
        (418, OSError, "the server answers 418"),
        (204, OSError, "the server answers 204"),
        (304, OSError, "the server answers 304"),
        (501, OSError, "the server answers 501"),
    ],
)
@each_read
def test_each_answer_has_its_meaning_at_once(
    server: WebServer,
    store: HttpsStore,
    clock: Clock,
    read: Callable[[HttpsStore, str], object],
    status: int,
    kind: type[OSError],
    words: str,
) -> None:
    with pytest.raises(OSError, match=rf"{words}.*/a'") as caught:
        read(store, server.put("/a", status=status))
    assert type(caught.value) is kind
    assert clock.waits == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 522])
def test_a_host_that_is_busy_is_asked_again(server: WebServer, store: HttpsStore, clock: Clock, status: int) -> None:
    uri = server.put("/a", *[Page(status=status)] * 3, Page(data=BODY))
    assert store.read_bytes(uri) == BODY
    expected = [0.5, 1.0, 2.0]
    assert all(most / 2 <= wait <= most for wait, most in zip(clock.waits, expected, strict=True))


@each_read
def test_a_host_that_stays_busy_is_an_error_of_the_object(
    server: WebServer, store: HttpsStore, clock: Clock, read: Callable[[HttpsStore, str], object]
) -> None:
    with pytest.raises(OSError, match=r"the server answers 503.*/a'"):
        read(store, server.put("/a", status=503))
    assert len(clock.waits) == Patience().attempts - 1


def in_a_while(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("9999", 60, 60),
        (in_a_while(-100), 0, 0),
        (in_a_while(10_000), 60, 60),
        ("soon", 0.25, 0.5),
    ],
    ids=["seconds", "at once", "long", "past", "far", "nonsense"],
)
def test_the_wait_that_a_server_asks_for_is_kept_up_to_a_minute(
    server: WebServer, store: HttpsStore, clock: Clock, value: str, low: float, high: float
) -> None:
    uri = server.put("/a", Page(status=429, headers={"Retry-After": value}), Page(data=BODY))
    assert store.read_bytes(uri) == BODY
    assert low <= clock.waits[0] <= high


def test_no_wait_is_begun_that_would_end_too_late(server: WebServer, clock: Clock) -> None:
    patience = Patience(total_s=100)
    store = HttpsStore(allow_private_hosts=True, patience=patience, sleep=clock.sleep, now=clock.now)
    with pytest.raises(OSError, match="the server answers 429"):
        store.read_bytes(server.put("/a", status=429, headers={"Retry-After": "60"}))
    assert clock.waits == [60]


def test_a_body_that_takes_too_long_is_given_up(server: WebServer) -> None:
    class Late(Clock):
        def now(self) -> float:
            self.now_s += 40
            return self.now_s

    clock = Late()
    patience = Patience(total_s=100)
    store = HttpsStore(allow_private_hosts=True, patience=patience, sleep=clock.sleep, now=clock.now)
    with pytest.raises(OSError, match="the server sends too slowly"):
        store.read_bytes(server.put("/a", data=BODY * 40))


def test_a_server_that_says_nothing_is_given_up_after_the_silence(server: WebServer, clock: Clock) -> None:
    patience = Patience(silence_s=0.05)
    store = HttpsStore(allow_private_hosts=True, patience=patience, sleep=clock.sleep, now=clock.now)
    with pytest.raises(OSError, match=r"no data for 0.05 s.*/a'"):
        store.read_bytes(server.put("/a", data=BODY, is_silent=True))


@pytest.mark.parametrize("uri", ["http://", "http:///x", "https://[::1", "http://h:99999999/x", "http://h:port/x"])
def test_what_is_no_url_is_an_error_of_the_object(store: HttpsStore, clock: Clock, uri: str) -> None:
    with pytest.raises(OSError, match="not a valid URL"):
        store.read_bytes(uri)
    assert clock.waits == []


# --- which failures concern more than one object ---------------------------------------------------------------------


def failures(store: HttpsStore, uris: list[str]) -> list[type[Exception]]:
    kinds = []
    for uri in uris:
        with pytest.raises((OSError, ServiceError), match=r"127\.0\.0") as caught:
            store.read_bytes(uri)
        kinds.append(type(caught.value))
    return kinds


def test_a_dead_host_costs_its_rows_and_is_tried_once_each(store: HttpsStore, clock: Clock, closed_port: int) -> None:
    uri = f"http://127.0.0.1:{closed_port}/x"
    assert set(failures(store, [uri] * 3 * FAILURES_IN_A_ROW)) == {OSError}
    assert len(clock.waits) == Patience().attempts - 1


def test_a_dead_host_that_answers_again_is_given_all_attempts(server: WebServer) -> None:
    store = HttpsStore(allow_private_hosts=True, patience=Patience(silence_s=2.0, attempts=2, backoff_s=0.0))
    uri = server.put("/a", *[Page(is_silent=True)] * 2, Page(data=BODY), Page(status=503), Page(data=BODY))
    with pytest.raises(OSError, match="no data"):
        store.read_bytes(uri)
    assert store.read_bytes(uri) == BODY
    assert store.read_bytes(uri) == BODY


def test_the_only_host_of_a_process_that_goes_down_is_a_service(server: WebServer, store: HttpsStore) -> None:
    store.read_bytes(server.put("/a", data=BODY))
    kinds = failures(store, [server.put("/b", status=503)] * FAILURES_IN_A_ROW)
    assert kinds == [OSError] * (FAILURES_IN_A_ROW - 1) + [ServiceError]


def test_a_page_that_always_fails_between_good_ones_is_a_row(server: WebServer, store: HttpsStore) -> None:
    good, bad = server.put("/a", data=BODY), server.put("/b", status=500)
    for _ in range(2 * FAILURES_IN_A_ROW):
        assert store.read_bytes(good) == BODY
        assert failures(store, [bad]) == [OSError]


def test_one_host_of_several_that_goes_down_costs_its_rows(server: WebServer, store: HttpsStore) -> None:
    store.read_bytes(server.put("/a", data=BODY))
    store.read_bytes(server.put("/a", data=BODY).replace("127.0.0.1", "localhost"))
    assert set(failures(store, [server.put("/b", status=503)] * 2 * FAILURES_IN_A_ROW)) == {OSError}


def test_no_host_at_all_for_a_minute_is_no_network(store: HttpsStore, clock: Clock, closed_port: int) -> None:
    *uris, last = [f"http://127.0.0.{host}:{closed_port}/x" for host in range(2, 2 + FAILURES_IN_A_ROW)]
    assert set(failures(store, uris)) == {OSError}
    clock.now_s += NETWORK_S
    with pytest.raises(ServiceError, match="is there a network"):
        store.read_bytes(last)


def test_many_dead_hosts_within_a_minute_are_rows(clock: Clock, closed_port: int) -> None:
    store = HttpsStore(allow_private_hosts=True, patience=Patience(attempts=1), sleep=clock.sleep, now=clock.now)
    uris = [f"http://127.0.0.{host}:{closed_port}/x" for host in range(2, 2 + 2 * FAILURES_IN_A_ROW)]
    assert set(failures(store, uris)) == {OSError}


def test_few_hosts_that_never_answer_are_rows_however_long(store: HttpsStore, clock: Clock, closed_port: int) -> None:
    clock.now_s += 10 * NETWORK_S
    uris = [f"http://127.0.0.{host}:{closed_port}/x" for host in range(2, 1 + FAILURES_IN_A_ROW)]
    assert set(failures(store, uris * 2)) == {OSError}


# --- redirects -------------------------------------------------------------------------------------------------------


def moved(to: str, status: int = 302) -> Page:
    return Page(status=status, headers={"Location": to})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: WebServer, store: HttpsStore, status: int) -> None:
    server.put("/deep/b", data=BODY)
    server.put("/deep/a", moved("b", status))
    uri = server.put("/start", moved("/deep/a", status))
    entry, data = store.read_object(uri, max_bytes=len(BODY))
    assert (entry.uri, data) == (uri, BODY)
    assert store.entry_of(uri).size_bytes == len(BODY)
    assert store.read_range(uri, 3, 4) == BODY[3:7]


def test_a_circle_of_redirects_ends(server: WebServer, store: HttpsStore) -> None:
    uri = server.put("/a", moved("/a"))
    with pytest.raises(OSError, match=rf"more than {MAX_REDIRECTS} redirects"):
        store.read_bytes(uri)
    assert len(server.asked) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1"])
def test_a_redirect_to_no_web_server_is_refused(server: WebServer, store: HttpsStore, to: str) -> None:
    with pytest.raises(OSError, match="not a valid URL"):
        store.read_bytes(server.put("/a", moved(to)))


# --- credentials -----------------------------------------------------------------------------------------------------


def with_user(url: str, user: str = "ann:p%40ss") -> str:
    return url.replace("http://", f"http://{user}@")


def test_user_info_is_sent_to_its_own_server_alone(server: WebServer, store: HttpsStore) -> None:
    with running_web_server() as other:
        server.put("/b", moved(other.put("/c", data=BODY)))
        uri = with_user(server.put("/a", moved("/b")))
        assert store.read_bytes(uri) == BODY
        expected = f"Basic {base64.b64encode(b'ann:p@ss').decode()}"
        assert [asked.headers["Authorization"] for asked in server.asked] == [expected] * 2
        assert other.asked[0].headers["Authorization"] is None


def test_a_query_is_sent_and_a_fragment_is_not(server: WebServer, store: HttpsStore) -> None:
    uri = server.put(f"/a%20b.png?{SECRET}&x=%2Fy/", data=BODY)
    assert store.read_bytes(f"{uri}#part") == BODY


@each_read
@pytest.mark.parametrize(
    "page",
    [
        Page(status=404),
        Page(status=403),
        Page(status=418),
        Page(status=503),
        Page(data=BODY, headers={"Content-Encoding": "br"}),
        moved("ftp://x/y?X-Amz-Signature=5ec2e7"),
        moved("/a?X-Amz-Signature=5ec2e7"),
    ],
    ids=lambda page: f"{page.status}",
)
def test_no_error_shows_a_query_or_user_info(
    server: WebServer,
    store: HttpsStore,
    caplog: pytest.LogCaptureFixture,
    read: Callable[[HttpsStore, str], object],
    page: Page,
) -> None:
    uri = with_user(server.put(f"/a?{SECRET}", page), "ann:5ec2e7")
    with pytest.raises(OSError, match=rf"http://127.0.0.1:{server.port}/a") as caught:
        read(store, uri)
    assert "5ec2e7" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "5ec2e7" not in caplog.text


def test_headers_that_cannot_be_parsed_show_no_query_in_the_log(
    server: WebServer, store: HttpsStore, caplog: pytest.LogCaptureFixture
) -> None:
    uri = server.put(f"/a?{SECRET}", data=b"abc", headers={"Bad header": "x"})
    store.entry_of(uri)
    assert "5ec2e7" not in caplog.text


def test_a_host_that_is_not_reached_shows_no_query_either(store: HttpsStore, closed_port: int) -> None:
    with pytest.raises(OSError, match=r"no connection: Connection refused: 'http://127.0.0.1:\d+/x'"):
        store.read_bytes(f"http://ann:5ec2e7@127.0.0.1:{closed_port}/x?{SECRET}")


# --- what the store cannot do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda store, uri: list(store.scan_entries(uri)),
        lambda store, uri: list(store.list_entries(uri)),
        lambda store, uri: store.list_level(uri),
        lambda store, uri: store.download_folder(uri, Path("x")),
    ],
)
def test_a_web_server_cannot_be_listed(store: HttpsStore, call: Callable[[HttpsStore, str], object]) -> None:
    words = r"cannot be listed; name a single file, an archive, or a list .*Received: 'https://h/x'"
    with pytest.raises(StorageError, match=words):
        call(store, f"https://ann:5ec2e7@h/x?{SECRET}")


@pytest.mark.parametrize(
    "call",
    [
        lambda store, uri: store.write_bytes(uri, b""),
        lambda store, uri: store.create_bytes(uri, b""),
        lambda store, uri: store.upload(Path(__file__), uri),
        lambda store, uri: store.upload_folder(Path(__file__).parent, uri),
        lambda store, uri: store.new_object(uri),
        lambda store, uri: store.move(uri, uri),
        lambda store, uri: store.delete(uri),
        lambda store, uri: store.delete_tree(uri),
        lambda store, uri: store.check_writable(uri),
    ],
)
def test_a_web_server_cannot_be_written(store: HttpsStore, call: Callable[[HttpsStore, str], object]) -> None:
    with pytest.raises(StorageError, match=r"read-only.*Received: 'https://h/x[^?]*'") as caught:
        call(store, f"https://ann:5ec2e7@h/x?{SECRET}")
    assert "5ec2e7" not in str(caught.value)


# --- threads and processes -------------------------------------------------------------------------------------------


def test_many_threads_read_their_own_bytes_over_few_connections(server: WebServer, store: HttpsStore) -> None:
    uris = {server.put(f"/{number}", data=bytes([number]) * (1_000 + 997 * number)): number for number in range(64)}
    start = threading.Barrier(32)

    def read(uri: str) -> bytes:
        start.wait()
        return store.read_bytes(uri)

    with ThreadPoolExecutor(32) as threads:
        for uri, data in zip(uris, threads.map(read, uris), strict=True):
            assert data == bytes([uris[uri]]) * (1_000 + 997 * uris[uri])


def test_a_store_crosses_processes_with_its_settings(server: WebServer) -> None:
    uri = server.put("/a", data=BODY)
    allowed = pickle.loads(pickle.dumps(HttpsStore(allow_private_hosts=True, patience=Patience(attempts=2))))
    assert allowed.read_bytes(uri) == BODY
    with pytest.raises(PermissionError, match="--allow-private-hosts"):
        pickle.loads(pickle.dumps(HttpsStore())).read_bytes(uri)


# --- proxies ---------------------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_used(
    server: WebServer, store: HttpsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//bob:5ec2e7@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.pages["http://images.test/a"] = Page(data=BODY)
    assert store.read_bytes("http://images.test/a#part") == BODY
    assert server.asked[0].headers["Proxy-Authorization"] == f"Basic {base64.b64encode(b'bob:5ec2e7').decode()}"
    assert store.read_bytes(server.put("/direct", data=b"x")) == b"x"
    assert "Proxy-Authorization" not in server.asked[1].headers


def test_a_proxy_that_fails_is_a_service(
    server: WebServer, store: HttpsStore, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.pages["http://images.test/a"] = Page(status=407)
    with pytest.raises(ServiceError, match=r"http://images.test/a: the proxy asks for a password"):
        store.read_bytes("http://images.test/a")
    monkeypatch.setenv("http_proxy", f"http://bob:5ec2e7@127.0.0.1:{closed_port}")
    store.forget_clients()
    with pytest.raises(ServiceError, match=r"http://images.test/a: the proxy cannot be reached$"):
        store.read_bytes("http://images.test/a")


def test_a_private_host_is_not_asked_of_a_proxy(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(PermissionError, match=r"127\.0\.0\.1, which is not public"):
        HttpsStore().read_bytes("http://127.0.0.1:1/a")
    assert server.asked == []


# --- an internet on loopback -----------------------------------------------------------------------------------------

REFUSING = "93.184.216.35"


@dataclass
class Internet:
    """Names and public addresses that all lead to one server on loopback."""

    server: WebServer
    names: dict[str, list[str]]
    resolved: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)

    def plug_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the resolver, and of connections to checked addresses."""
        resolve = socket.getaddrinfo

        def fake_resolve(host: str, port: int, *args: Any, **keywords: Any) -> Any:
            if host not in self.names:
                return resolve(host, port, *args, **keywords)
            self.resolved.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.names[host]]

        def fake_connect(address: tuple[str, int], *args: Any, **keywords: Any) -> socket.socket:
            self.connected.append(address[0])
            if address[0] == REFUSING:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            return create_connection(("127.0.0.1", self.server.port), *args, **keywords)

        monkeypatch.setattr(socket, "getaddrinfo", fake_resolve)
        monkeypatch.setattr(public_hosts, "create_connection", fake_connect)


@pytest.fixture
def internet(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> Internet:
    one = Internet(server, {"images.test": ["93.184.216.34"]})
    one.plug_in(monkeypatch)
    return one


# --- encrypted -------------------------------------------------------------------------------------------------------

CERTIFICATE = Path(__file__).with_name("loopback.pem")


@pytest.fixture
def encrypted() -> Iterator[WebServer]:
    with running_web_server(certificate=CERTIFICATE) as one:
        one.put("/a", data=BODY)
        yield one


def test_an_encrypted_object_is_read_if_its_certificate_is_trusted(
    encrypted: WebServer, store: HttpsStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"https://localhost:{encrypted.port}/a"
    with pytest.raises(OSError, match=r"the certificate is not trusted: self.signed certificate: 'https://localhost:"):
        store.read_bytes(uri)
    assert clock.waits == []
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    store.forget_clients()
    assert store.read_bytes(uri) == BODY
    with pytest.raises(OSError, match=r"the certificate is not trusted: IP address mismatch"):
        store.read_bytes(f"https://127.0.0.1:{encrypted.port}/a")


def test_an_encrypted_connection_goes_to_the_address_that_was_checked(
    encrypted: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    internet = Internet(encrypted, {"images.test": ["93.184.216.34"]})
    internet.plug_in(monkeypatch)
    assert HttpsStore().read_bytes("https://images.test/a") == BODY
    assert internet.connected == ["93.184.216.34"]


def test_a_server_that_is_not_encrypted_is_an_error_of_the_object(server: WebServer, store: HttpsStore) -> None:
    with pytest.raises(OSError, match=r"no encrypted connection \(TLS\): 'https://localhost:\d+/a'"):
        store.read_bytes(f"https://localhost:{server.port}/a")


# --- private hosts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.1.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%lo", False),
        ("fc00::1", False),
        ("ff0e::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
    ],
)
def test_public_addresses_are_told_from_others(address: str, expected: bool) -> None:
    assert is_public(address) == expected


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "0",
    ],
)
def test_loopback_is_refused_however_it_is_spelt(server: WebServer, host: str) -> None:
    server.put("/a", data=BODY)
    words = rf"the host has the address .*, which is not public \(--allow-private-hosts allows it\).*:{server.port}/a'"
    with pytest.raises(PermissionError, match=words):
        HttpsStore().read_bytes(f"http://{host}:{server.port}/a")
    assert server.asked == []


def test_a_connection_goes_to_the_address_that_was_checked(internet: Internet) -> None:
    internet.server.put("/a", data=BODY)
    assert HttpsStore().read_bytes("http://images.test/a") == BODY
    assert internet.connected == ["93.184.216.34"]
    assert internet.resolved == ["images.test"]  # once: a second answer could be another one
    assert internet.server.asked[0].headers["Host"] == "images.test"


def test_a_name_with_one_private_address_is_refused(internet: Internet) -> None:
    internet.names["rebound.test"] = ["93.184.216.34", "10.0.0.1"]
    with pytest.raises(PermissionError, match=r"the address 10\.0\.0\.1, which is not public"):
        HttpsStore().read_bytes("http://rebound.test/a")
    assert internet.connected == []


def test_each_redirect_is_checked_again(internet: Internet) -> None:
    internet.server.put(f"/a?{SECRET}", moved(f"http://127.0.0.1:{internet.server.port}/b"))
    with pytest.raises(PermissionError, match=r"the address 127.0.0.1, which is not public.*http://images.test/a"):
        HttpsStore().read_bytes(f"http://images.test/a?{SECRET}")
    assert [asked.path for asked in internet.server.asked] == [f"/a?{SECRET}"]


def test_the_next_address_of_a_name_is_tried(internet: Internet) -> None:
    internet.names["images.test"] = [REFUSING, "93.184.216.34"]
    internet.server.put("/a", data=BODY)
    assert HttpsStore().read_bytes("http://images.test/a") == BODY
    assert internet.connected == [REFUSING, "93.184.216.34"]


def test_a_name_that_is_not_resolved_is_an_error_of_the_object(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError, match=r"the host name cannot be resolved.*http://nowhere.test/a"):
        HttpsStore(sleep=clock.sleep, now=clock.now).read_bytes("http://nowhere.test/a")
