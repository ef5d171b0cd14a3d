"""URIs as text: their forms, of paths, buckets and web servers, and what of them may be shown."""

import pyarrow as pa
import pytest

from mnist_dist.errors import StorageError
from mnist_dist.store.uris import (
    absolute,
    are_remote,
    bucket_and_key,
    is_absolute,
    is_bucket,
    is_remote,
    is_web,
    join,
    parent_of,
    scheme_of,
    shown,
)

SIGNED = "https://h.test:8443/a/b.png?X-Amz-Signature=5ec2e7&x=/y/#z"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://h.test/a/b.png", "https://h.test/a/b.png"),
        (SIGNED, "https://h.test:8443/a/b.png"),
        ("http://h.test/a#5ec2e7", "http://h.test/a"),
        ("http://h.test?5ec2e7/a", "http://h.test"),
        ("https://h.test/a?", "https://h.test/a"),
        ("https://ann:5ec2e7@h.test/a", "https://h.test/a"),
        ("https://5ec2e7@h.test", "https://h.test"),
        ("https://ann:5ec@2e7@h.test/a", "https://h.test/a"),
        ("https://ann:5ec/2e7@h.test/a", "https://..."),
        ("https://ann:5ec?2e7@h.test/a", "https://..."),
        ("https://ann:5ec#2e7@h.test/a", "https://..."),
        ("https://[::1]:80/@ann/a?5ec2e7", "https://[::1]:80/@ann/a"),
        ("HTTPS://ann:5ec2e7@h.test/a?5ec2e7", "HTTPS://h.test/a"),
        ("ftp://ann:5ec2e7@h.test/a?x", "ftp://h.test/a"),
        ("s3://bucket/a?b#c@d", "s3://bucket/a?b#c@d"),
        ("memory://bucket/a?b", "memory://bucket/a?b"),
        ("file:///a?b", "file:///a?b"),
        ("/a/https://ann:x@h/b?c", "/a/https://ann:x@h/b?c"),
        ("a?b#c", "a?b#c"),
        ("", ""),
    ],
)
def test_user_info_and_query_of_a_url_are_never_shown(uri: str, expected: str) -> None:
    assert shown(uri) == expected
    assert shown(expected) == expected
    assert "5ec" not in expected


def test_an_unknown_scheme_shows_no_password() -> None:
    with pytest.raises(StorageError, match=r"Received: 'ftp://h.test/a'$"):
        scheme_of("ftp://ann:5ec2e7@h.test/a?x")


@pytest.mark.parametrize("uri", ["https://h.test", "http://h.test/", SIGNED])
def test_a_url_is_remote_and_stays_as_it_is(uri: str) -> None:
    assert is_remote(uri)
    assert is_web(uri)
    assert scheme_of(uri) == uri.partition(":")[0]
    assert absolute(uri) == uri
    assert is_absolute(uri)


@pytest.mark.parametrize("uri", ["s3://b/x", "/https://h/x", "https", "file:///x", "ftp://h/x"])
def test_what_is_no_url_of_a_web_server(uri: str) -> None:
    assert not is_web(uri)


def test_remote_uris_of_a_column_include_urls() -> None:
    column = pa.chunked_array([["https://h/x", "http://h/x", "/a/https://h/x", "httpsx://h", None]])
    assert are_remote(column).to_pylist() == [True, True, False, False, None]


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("https://h.test", ["a", "b"], "https://h.test/a/b"),
        ("https://h.test/a/", ["/b/"], "https://h.test/a/b"),
        (SIGNED, ["c"], "https://h.test:8443/a/b.png/c?X-Amz-Signature=5ec2e7&x=/y/#z"),
        ("s3://b/a?b", ["c"], "s3://b/a?b/c"),
        ("/x/a?b#c", ["d"], "/x/a?b#c/d"),
    ],
)
def test_joining_adds_to_the_path_before_a_query(uri: str, parts: list[str], expected: str) -> None:
    assert join(uri, *parts) == expected


@pytest.mark.parametrize(
    ("uri", "parent", "is_whole"),
    [
        (SIGNED, "https://h.test:8443/a", False),
        ("https://h.test/a?x=/y", "https://h.test", False),
        ("https://h.test", "https://h.test", True),
        ("https://h.test/", "https://h.test/", True),
        ("https://h.test?x=/y", "https://h.test?x=/y", True),
        ("s3://b/a?x=/y", "s3://b/a?x=", False),
    ],
)
def test_a_query_names_no_folder(uri: str, parent: str, is_whole: bool) -> None:
    assert (parent_of(uri), is_bucket(uri)) == (parent, is_whole)


def test_a_url_is_split_into_host_and_path() -> None:
    assert bucket_and_key(SIGNED) == ("h.test:8443", "a/b.png")
    with pytest.raises(StorageError, match=r"must be https://bucket/key\. Received: 'https:///x'"):
        bucket_and_key("https:///x?5ec2e7")
