"""The stores of cloud providers: what their contract (test_store) leaves out. Lost answers, refusals, secrets."""

import contextlib
import gzip
import itertools
import json
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import emulators
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from emulators import Answer, Proxy
from pyarrow.fs import FileSelector, FileType, copy_files

from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.arrow_files import ray_storage
from mnist_dist.store.azure import AzureStore
from mnist_dist.store.base import Store
from mnist_dist.store.clients import public_line
from mnist_dist.store.gcs import GcsStore

IMPATIENT: dict[str, Callable[[], Store]] = {"gs": lambda: GcsStore(0.1), "az": lambda: AzureStore(0)}


@pytest.fixture(params=["s3", "gcs", "azure"])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["gcs", "azure"])
def new_prefix(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def impatient(uri: str) -> Store:
    """A store of its own that tries a request once or twice."""
    return IMPATIENT[uri.partition("://")[0]]()


@pytest.fixture
def proxy(prefix: str) -> Iterator[Proxy]:
    with emulators.proxy_before(prefix) as proxy:
        yield proxy


def once(matches: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """Whether a request is the first that matches."""
    count = itertools.count()
    return lambda method, path: matches(method, path) and next(count) == 0


# --- what is written -------------------------------------------------------------------------------------------------


def test_who_creates_an_object_knows_it_though_the_answer_is_lost(prefix: str, proxy: Proxy) -> None:
    proxy.lose = once(lambda method, path: method in ("PUT", "POST"))
    assert ANYWHERE.create_bytes(f"{prefix}/lock", b"mine")
    assert sum(method in ("PUT", "POST") for method, _ in proxy.asked) == 2
    assert not ANYWHERE.create_bytes(f"{prefix}/lock", b"mine")
    assert ANYWHERE.read_bytes(f"{prefix}/lock") == b"mine"


def test_one_of_many_wins_when_answers_are_lost(prefix: str, proxy: Proxy) -> None:
    count = itertools.count()
    proxy.lose = lambda method, path: method in ("PUT", "POST") and next(count) % 3 == 0
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ANYWHERE.create_bytes(f"{prefix}/lock", b"same"), range(8)))
    assert sorted(made) == [False] * 7 + [True]


def test_a_body_that_breaks_off_is_read_to_its_end(prefix: str, proxy: Proxy) -> None:
    ANYWHERE.write_bytes(f"{prefix}/x", bytes(range(256)) * 100)
    proxy.cut = lambda method, path: 5_000 if cut(method, path) else None
    cut = once(lambda method, path: method == "GET")
    assert ANYWHERE.read_bytes(f"{prefix}/x") == bytes(range(256)) * 100


def test_blocks_of_two_writers_are_not_mixed(azure: str, proxy_of_azure: Proxy, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * (40 << 20))
    blocks = itertools.count()

    def interfere(method: str, path: str) -> None:
        if "comp=block&" in f"{path}&" and next(blocks) == 1:
            AzureStore().upload(tmp_path / "b", f"{azure}/x")

    proxy_of_azure.answer = interfere
    with contextlib.suppress(ServiceError):  # Its first block went when the other's were committed.
        AzureStore().upload(tmp_path / "a", f"{azure}/x")
    assert next(blocks) > 3
    assert set(ANYWHERE.read_bytes(f"{azure}/x")) in ({ord("a")}, {ord("b")})


@pytest.fixture
def proxy_of_azure(azure: str) -> Iterator[Proxy]:
    with emulators.proxy_before(azure) as proxy:
        yield proxy


def test_what_is_replaced_while_it_is_fetched_is_no_mixture(azure: str, proxy_of_azure: Proxy, tmp_path: Path) -> None:
    ANYWHERE.write_bytes(f"{azure}/x", b"a" * (20 << 20))
    second = once(lambda method, path: method == "GET" and sum(kind == "GET" for kind, _ in proxy_of_azure.asked) == 2)

    def interfere(method: str, path: str) -> None:
        if second(method, path):
            AzureStore().write_bytes(f"{azure}/x", b"b" * (20 << 20))

    proxy_of_azure.answer = interfere
    with pytest.raises(OSError, match="replaced while it was read"):
        ANYWHERE.download(f"{azure}/x", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_each_part_is_asked_of_the_same_generation(gcs: str, tmp_path: Path) -> None:
    ANYWHERE.write_bytes(f"{gcs}/x", b"a" * (20 << 20))
    with emulators.proxy_before(gcs) as proxy:
        ANYWHERE.download(f"{gcs}/x", tmp_path / "x")
        parts = [path for _, path in proxy.asked if "alt=media" in path]
    etag = ANYWHERE.entry_of(f"{gcs}/x").etag  # The server of the tests does not look at it.
    assert [f"ifGenerationMatch={etag}" in path for path in parts] == [True, True]


def test_what_is_stored_compressed_is_read_as_it_is_stored(new_prefix: str) -> None:
    packed = gzip.compress(b"0123456789" * 100)
    put_packed(f"{new_prefix}/x", packed)
    assert ANYWHERE.read_bytes(f"{new_prefix}/x") == packed
    assert ANYWHERE.entry_of(f"{new_prefix}/x").size_bytes == len(packed)
    assert ANYWHERE.read_range(f"{new_prefix}/x", 3, 5) == packed[3:8]


def put_packed(uri: str, data: bytes) -> None:
    bucket, _, key = uri.partition("://")[2].partition("/")
    if uri.startswith("gs"):
        from google.cloud import storage

        blob = storage.Client(project="none").bucket(bucket).blob(key)
        blob.content_encoding = "gzip"
        blob.upload_from_string(data)
        return
    from azure.storage.blob import ContentSettings

    azure_client(bucket).upload_blob(key, data, content_settings=ContentSettings(content_encoding="gzip"))


def azure_client(container: str) -> Any:
    import os

    from azure.storage.blob import ContainerClient

    return ContainerClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"], container)


def test_folders_of_a_hierarchical_namespace_are_no_files(azure: str) -> None:
    bucket, _, key = azure.partition("://")[2].partition("/")
    for name in ("a", "a/b"):
        azure_client(bucket).upload_blob(f"{key}/{name}", b"", metadata={"hdi_isfolder": "true"})
    ANYWHERE.write_bytes(f"{azure}/a/b/x", b"1")
    assert [entry.uri for entry in ANYWHERE.list_entries(azure)] == [f"{azure}/a/b/x"]
    level = ANYWHERE.list_level(azure)
    assert (level.folders, dict(level.files)) == (("a",), {})
    for read in (ANYWHERE.entry_of, ANYWHERE.read_bytes):
        with pytest.raises(FileNotFoundError, match="a folder"):
            read(f"{azure}/a/b")
    with emulators.proxy_before(azure) as proxy:
        ANYWHERE.delete_tree(f"{azure}/a")
        deleted = [path.partition(key)[2].partition("?")[0] for method, path in proxy.asked if method == "DELETE"]
    assert deleted == ["/a/b/x", "/a/b", "/a"]  # Azurite would delete a folder that is not empty, Azure would not.
    assert [blob.name for blob in azure_client(bucket).list_blobs(name_starts_with=key)] == []


@pytest.mark.parametrize("key", ["a/../b", "..", "./a"])
def test_a_name_that_would_lead_elsewhere_is_refused(azure: str, key: str) -> None:
    with pytest.raises(OSError, match=r"no part '\.' or '\.\.'"):
        ANYWHERE.read_bytes(f"{azure}/{key}")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_bucket_is_told_from_a_missing_object(
    request: pytest.FixtureRequest, scheme: str, missing: bool, tmp_path: Path
) -> None:
    bucket = request.getfixturevalue("gcs" if scheme == "gs" else "azure")
    uri, kind = (f"{scheme}://no-such-bucket/x", StorageError) if missing else (f"{bucket}/x", FileNotFoundError)
    words = "no such (bucket|container)" if missing else "no such object"
    reads: list[Callable[[str], object]] = [
        ANYWHERE.read_bytes,
        ANYWHERE.entry_of,
        lambda uri: ANYWHERE.read_range(uri, 0, 3),
        lambda uri: ANYWHERE.download(uri, tmp_path / "x"),
    ]
    for read in reads:
        with pytest.raises(kind, match=words):
            read(uri)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_missing_bucket_can_be_neither_listed_nor_written(request: pytest.FixtureRequest, scheme: str) -> None:
    request.getfixturevalue("gcs" if scheme == "gs" else "azure")
    uri = f"{scheme}://no-such-bucket/x"
    uses: list[Callable[[], object]] = [
        lambda: ANYWHERE.exists(uri),
        lambda: list(ANYWHERE.list_entries(uri)),
        lambda: ANYWHERE.list_level(uri),
        lambda: ANYWHERE.write_bytes(uri, b"1"),
        lambda: ANYWHERE.create_bytes(uri, b"1"),
    ]
    for use in uses:
        with pytest.raises(StorageError, match=r"no such (bucket|container)"):
            use()


def google(status: int, reason: str, message: str) -> Answer:
    body = f'{{"error": {{"code": {status}, "message": "{message}", "errors": [{{"reason": "{reason}"}}]}}}}'
    return Answer(status, {"Content-Type": "application/json"}, body.encode())


def microsoft(status: int, code: str) -> Answer:
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>?sig=hidden</Message></Error>'
    return Answer(status, {"Content-Type": "application/xml", "x-ms-error-code": code}, body.encode())


@pytest.mark.parametrize(
    ("scheme", "answer", "kind"),
    [
        ("gs", google(401, "authError", "Invalid Credentials"), ServiceError),
        ("gs", google(403, "forbidden", "someone does not have storage.objects.get access"), PermissionError),
        ("gs", google(403, "accountDisabled", "The billing account is closed"), ServiceError),
        ("gs", google(403, "insufficientPermissions", "insufficient authentication scopes"), ServiceError),
        ("gs", google(400, "invalid", "encrypted by a customer-supplied key"), OSError),
        ("gs", google(400, "invalid", "Invalid bucket name"), StorageError),
        ("gs", google(429, "rateLimitExceeded", "slow down"), ServiceError),
        ("gs", google(503, "backendError", "try again"), ServiceError),
        ("az", microsoft(404, "BlobNotFound"), FileNotFoundError),
        ("az", microsoft(404, "ContainerNotFound"), StorageError),
        ("az", microsoft(400, "InvalidResourceName"), StorageError),
        ("az", microsoft(403, "AuthenticationFailed"), ServiceError),
        ("az", microsoft(403, "AuthorizationFailure"), ServiceError),
        ("az", microsoft(403, "AuthorizationPermissionMismatch"), PermissionError),
        ("az", microsoft(401, "InvalidAuthenticationInfo"), ServiceError),
        ("az", microsoft(409, "BlobArchived"), OSError),
        ("az", microsoft(409, "BlobUsesCustomerSpecifiedEncryption"), OSError),
        ("az", microsoft(503, "ServerBusy"), ServiceError),
        ("az", microsoft(500, "InternalError"), ServiceError),
    ],
)
def test_each_answer_has_its_meaning(
    request: pytest.FixtureRequest, scheme: str, answer: Answer, kind: type[Exception]
) -> None:
    uri = request.getfixturevalue("gcs" if scheme == "gs" else "azure") + "/x"
    with emulators.proxy_before(uri) as proxy:
        proxy.answer = lambda method, path: answer
        store = impatient(uri)
        for use in (store.read_bytes, store.entry_of, lambda uri: store.write_bytes(uri, b"1")):
            with pytest.raises(kind, match=uri) as raised:
                use(uri)
            assert raised.type is kind


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_no_connection_is_a_service_error(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    whole = f"AccountName=a;AccountKey={emulators.KEY};BlobEndpoint=http://127.0.0.1:9/a"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", whole)
    store = impatient(f"{scheme}://bucket/x")
    for use in (store.read_bytes, store.exists, lambda uri: list(store.scan_entries(uri))):
        with pytest.raises(ServiceError, match=rf"{scheme}://bucket/x: .*refused"):
            use(f"{scheme}://bucket/x")


def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN", "ENDPOINT"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)


def test_missing_credentials_are_a_service_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_settings(monkeypatch)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(ServiceError, match=r"gs://b/x: the credentials cannot be read: .*missing\.json"):
        GcsStore(0.1).read_bytes("gs://b/x")
    with pytest.raises(ServiceError, match="Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with"):
        AzureStore(0).read_bytes("az://b/x")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=secretive")
    with pytest.raises(ServiceError, match="az://b/x: the Azure settings cannot be used") as raised:
        AzureStore(0).read_bytes("az://b/x")
    assert "secretive" not in shown(raised.value)


def test_an_account_that_may_not_get_a_token_is_a_service_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_settings(monkeypatch)
    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with Proxy("http://127.0.0.1:9") as proxy:
        emulators.serve(proxy)
        body = b'{"error": "invalid_grant", "error_description": "the account is disabled"}'
        proxy.answer = lambda method, path: Answer(400, {"Content-Type": "application/json"}, body)
        account = {"type": "service_account", "client_email": "a@b", "private_key": key.decode(), "project_id": "p"}
        account["token_uri"] = f"http://127.0.0.1:{proxy.server_address[1]}/token"
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        for use in (GcsStore(0.1).read_bytes, GcsStore(0.1).entry_of, GcsStore(0.1).exists):
            with pytest.raises(ServiceError, match=r"gs://b/x: .*the account is disabled") as raised:
                use("gs://b/x")
            assert key.decode().splitlines()[1] not in shown(raised.value)
        proxy.shutdown()


def test_a_key_and_a_signature_open_an_account(azure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ANYWHERE.write_bytes(f"{azure}/x", b"1")
    endpoint = azure_client("bucket").url.rpartition("/")[0]
    tokens = {days: signature(days=days) for days in (1, -1)}
    without_settings(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", emulators.ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", tokens[1])
    assert AzureStore().read_bytes(f"{azure}/x") == b"1"
    with pytest.raises(PermissionError, match="access denied"):
        AzureStore(0).write_bytes(f"{azure}/x", b"2")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", tokens[-1])
    with pytest.raises(ServiceError, match="the credentials are not accepted"):
        AzureStore(0).read_bytes(f"{azure}/x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", emulators.KEY)
    AzureStore(0).write_bytes(f"{azure}/x", b"2")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(ServiceError, match="the credentials are not accepted"):
        AzureStore(0).entry_of(f"{azure}/x")


def signature(*, days: int) -> str:
    """A token that allows to read for so many days."""
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    return generate_account_sas(
        emulators.ACCOUNT,
        emulators.KEY,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, list=True),
        expiry=datetime.now(UTC) + timedelta(days=days),
    )


def test_settings_are_read_again_once_clients_are_forgotten(new_prefix: str) -> None:
    with emulators.proxy_before(new_prefix) as proxy:
        assert not ANYWHERE.exists(f"{new_prefix}/x")
        before = len(proxy.asked)
    assert not ANYWHERE.exists(f"{new_prefix}/x")
    assert (before > 0, len(proxy.asked)) == (True, before)


# --- secrets and packages --------------------------------------------------------------------------------------------


def shown(error: BaseException) -> str:
    """All that a traceback shows of an error, and what pickle carries to another process."""
    return "".join(traceback.format_exception(error)) + repr(pickle.loads(pickle.dumps(error)).args)


def test_no_error_shows_a_key_or_a_signature(azure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = signature(days=1)
    secret = token.partition("sig=")[2].partition("&")[0]
    without_settings(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", emulators.ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token)
    with Proxy("http://127.0.0.1:9") as proxy:
        emulators.serve(proxy)
        answers = [microsoft(status, code) for status, code in [(403, "AuthenticationFailed"), (500, "x"), (409, "y")]]
        for endpoint in (f"http://127.0.0.1:{proxy.server_address[1]}/a", "http://127.0.0.1:9/a", "http://no host/a"):
            for answer in answers:
                proxy.answer = lambda method, path, answer=answer: answer  # type: ignore[misc]
                monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
                for use in (AzureStore(0).read_bytes, AzureStore(0).exists, lambda uri: AzureStore(0).move(uri, uri)):
                    with pytest.raises((ServiceError, OSError), match=r"az://b/x") as raised:
                        use("az://b/x")
                    assert secret not in shown(raised.value)
                    assert "hidden" not in shown(raised.value)
        proxy.shutdown()


def test_a_public_line_has_no_secrets() -> None:
    line = public_line(ValueError("GET /c/k?sv=1&sig=ab%2Bc failed; AccountKey=xyz==; Bearer tok\nmore"))
    assert line == "GET /c/k?... failed; AccountKey=... Bearer=..."


@pytest.mark.parametrize(
    ("scheme", "package", "remedy"),
    [
        ("gs", "google.cloud.storage", r"gs:// needs .*pip install 'mnist_dist\[gcs\]'"),
        ("az", "azure.storage.blob", r"az:// needs .*pip install 'mnist_dist\[azure\]'"),
        ("az", "azure.identity", r"az:// needs .*pip install 'mnist_dist\[azure\]'"),
    ],
)
def test_a_missing_package_names_the_extra(
    scheme: str, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_settings(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")  # And no key, so that azure-identity is needed.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=remedy):
        impatient(f"{scheme}://b/x").read_bytes(f"{scheme}://b/x")


def test_nothing_of_a_provider_is_loaded_before_it_is_used() -> None:
    code = "import sys, mnist_dist.store.anywhere; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mnist_dist" in loaded
    assert not {"google", "azure"} & set(loaded)


def test_a_store_keeps_its_patience_in_another_process() -> None:
    for store in (GcsStore(1.5), AzureStore(7)):
        again = pickle.loads(pickle.dumps(store))
        assert again.__reduce__() == store.__reduce__()


# --- Ray's storage ---------------------------------------------------------------------------------------------------


def test_a_store_is_a_file_system_of_pyarrow(new_prefix: str) -> None:
    files, path = ray_storage(new_prefix, ANYWHERE)
    assert files is not None
    files = pickle.loads(pickle.dumps(files))
    files.create_dir(f"{path}/run")
    with files.open_output_stream(f"{path}/run/a.json") as stream:
        stream.write(b"12345")
        assert not ANYWHERE.exists(f"{new_prefix}/run/a.json")
    ANYWHERE.write_bytes(f"{new_prefix}/run/deep/b", b"1")
    infos = files.get_file_info([f"{path}/run", f"{path}/run/a.json", f"{path}/none"])
    assert [(info.type, info.size) for info in infos] == [
        (FileType.Directory, None),
        (FileType.File, 5),
        (FileType.NotFound, None),
    ]
    found = files.get_file_info(FileSelector(f"{path}/run", recursive=True))
    assert {info.path for info in found} == {f"{path}/run/a.json", f"{path}/run/deep", f"{path}/run/deep/b"}
    assert files.open_input_file(f"{path}/run/a.json").read() == b"12345"
    files.delete_dir(f"{path}/run")
    assert not ANYWHERE.exists(new_prefix)
    with pytest.raises(FileNotFoundError, match="nothing below"):
        files.get_file_info(FileSelector(f"{path}/run"))


def test_folders_go_through_pyarrow_and_back(new_prefix: str, tmp_path: Path) -> None:
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "deep" / "x").write_bytes(b"1" * 100_000)
    files, path = ray_storage(new_prefix, ANYWHERE)
    copy_files(str(tmp_path / "up"), path, destination_filesystem=files)
    assert ANYWHERE.read_bytes(f"{new_prefix}/deep/x") == b"1" * 100_000
    copy_files(path, str(tmp_path / "down"), source_filesystem=files)
    assert (tmp_path / "down" / "deep" / "x").read_bytes() == b"1" * 100_000


def test_pyarrow_itself_finds_disks_and_s3() -> None:
    assert [ray_storage(uri, ANYWHERE) for uri in ("/a", "s3://b/a")] == [(None, "/a"), (None, "s3://b/a")]
