"""One store in front of all kinds of stores: each URI goes to the store of its scheme."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from mnist_dist.config import StoreConfig
from mnist_dist.errors import StorageError
from mnist_dist.store.azure import AzureStore
from mnist_dist.store.base import Entry, Level, Store
from mnist_dist.store.gcs import GcsStore
from mnist_dist.store.https import HttpsStore
from mnist_dist.store.local import LocalStore
from mnist_dist.store.s3 import S3Store
from mnist_dist.store.uris import AZURE, GCS, S3, check_form, scheme_of, shown
from mnist_dist.urls import WEB


class Anywhere(Store):
    """Hands each call to the store of the URI's scheme.

    Args:
        stores: stores by scheme; the empty scheme is for local files.
        config: of `store_for`, which makes the same store again in another process. None: the stores are pickled.
    """

    def __init__(self, stores: Mapping[str, Store], config: StoreConfig | None = None) -> None:
        self.stores, self._config = stores, config

    def of(self, uri: str) -> Store:
        """The store of a URI.

        Raises:
            StorageError: there is no store for the scheme.
        """
        scheme = scheme_of(uri)
        if scheme not in self.stores:
            raise StorageError(f"there is no store for the scheme {scheme!r}. Received: {shown(uri)!r}")
        return self.stores[scheme]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Anywhere, (self.stores,)) if self._config is None else (store_for, (self._config,))

    def forget_clients(self) -> None:
        for store in self.stores.values():
            store.forget_clients()

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        return self.of(uri).read_object(uri, max_bytes=max_bytes)

    def read_bytes(self, uri: str) -> bytes:
        return self.of(uri).read_bytes(uri)

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        return self.of(uri).read_range(uri, start, length)

    def entry_of(self, uri: str) -> Entry:
        return self.of(uri).entry_of(uri)

    def exists(self, uri: str) -> bool:
        return self.of(uri).exists(uri)

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        return self.of(uri).scan_entries(uri)

    def list_entries(self, uri: str) -> Iterator[Entry]:
        return self.of(uri).list_entries(uri)

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        return self.of(uri).list_level(uri, max_names=max_names)

    def open_binary(self, uri: str) -> BinaryIO:
        return self.of(uri).open_binary(uri)

    def local_path(self, uri: str, scratch: Path) -> Path:
        return self.of(uri).local_path(uri, scratch)

    def download(self, uri: str, path: Path) -> None:
        self.of(uri).download(uri, path)

    def write_bytes(self, uri: str, data: bytes) -> None:
        self.of(uri).write_bytes(uri, data)

    def create_bytes(self, uri: str, data: bytes) -> bool:
        return self.of(uri).create_bytes(uri, data)

    def upload(self, path: Path, uri: str) -> None:
        self.of(uri).upload(path, uri)

    def new_object(self, uri: str) -> AbstractContextManager[BinaryIO]:
        return self.of(uri).new_object(uri)

    def upload_folder(self, local: Path, uri: str, *, last: str | None = None) -> None:
        self.of(uri).upload_folder(local, uri, last=last)

    def check_access(self, uri: str) -> None:
        self.of(uri).check_access(uri)

    def delete_leftovers(self, uri: str) -> None:
        self.of(uri).delete_leftovers(uri)

    def object_store_access(self, uri: str) -> tuple[str, dict[str, str]]:
        return self.of(uri).object_store_access(uri)

    def move(self, source: str, target: str) -> None:
        self.of(source).move(source, target)

    def delete(self, uri: str) -> None:
        self.of(uri).delete(uri)

    def delete_empty_folder(self, uri: str) -> None:
        self.of(uri).delete_empty_folder(uri)

    def delete_tree(self, uri: str) -> None:
        self.of(uri).delete_tree(uri)


@functools.cache
def store_for(config: StoreConfig) -> Anywhere:
    """The store with these settings: one per process, with its clients. A worker gets the same one by pickle.

    Args:
        config: how to reach the images of a job.
    """
    web = HttpsStore(allow_private_hosts=config.allow_private_hosts)
    s3 = S3Store(anonymous=config.s3_anonymous, requester_pays=config.s3_requester_pays)
    cloud = {S3: s3, GCS: GcsStore(), AZURE: AzureStore()}
    return Anywhere({"": LocalStore(), **cloud, **dict.fromkeys(WEB, web)}, config)


def check_access(uris: Iterable[str | None], *, store: Store | None = None) -> None:
    """Checks the places that a job names, before any work: their form, and that there are credentials for them.

    Args:
        uris: what the flags name; None: nothing.
        store: the store they are read or written with; None: that of a job's own files.

    Raises:
        StorageError: a place is misspelt, its scheme is unknown, or this process has no credentials for it.
    """
    firsts = dict[str, str]()  # Looking for credentials may take seconds, so each kind of store is asked once.
    for uri in filter(None, uris):
        check_form(uri)
        firsts.setdefault(scheme_of(uri), uri)
    for uri in firsts.values():
        (store or ANYWHERE).check_access(uri)


ANYWHERE = store_for(StoreConfig())
"""The store of a job's own files, such as bundles and tables: the settings of its images do not apply to them."""
