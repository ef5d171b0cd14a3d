"""The Delta form of a prediction table: `<output>/delta/`, one transaction for each version of the table.

Owns: the transactions, the types that Delta knows, and vacuuming. Does not own: the files (`parts`), or when a version
is published (`commit`). The package `deltalake` is loaded on first use; it is in the extra `delta`.

Each transaction carries the number of the version (application transaction id `mnist_dist`), and is committed through
the very handle in which that number was compared: of two drivers that publish, one gets a conflict, loads the table
again and sees that the work is done. The log is the truth of Delta's readers, the mark that of `read_predictions`. Both
name the same files, until another program changes the table; the next version names ours again. Replaced files stay for
readers of older versions until `vacuum`.
"""

import json
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mnist_dist.errors import ConfigError, DataError, ServiceError, first_line
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote, join

if TYPE_CHECKING:
    from deltalake import DeltaTable

APPLICATION = "mnist_dist"
_FORBIDDEN = frozenset(" ,;{}()\n\t=")  # Spark's, without column mapping.
CONFLICTS = 20  # Others may commit in between, such as a job that optimizes the table; each conflict loads it again.
_WIDER = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64()}  # Delta's integers are signed.


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the table, as its log describes it."""

    name: str
    rows: int
    min_uri: str | None
    """The smallest URI; None: there are no rows."""
    max_uri: str | None


def check_output(uri: str, store: Store) -> None:
    """Checks that a Delta table can be kept in an output.

    Raises:
        ConfigError: the package `deltalake` is missing, or would read the URI as another one.
        StorageError: the store cannot be reached by it.
    """
    store.object_store_access(uri)
    unusable = set("%\\\n\r\t") | (set("#?") if is_remote(uri) else set())
    if unusable.intersection(uri) or "//" in uri.partition("://")[2]:
        raise ConfigError(
            f"the output of a Delta table must not have one of {' '.join(sorted(unusable - set(string.whitespace)))}, "
            f"control characters or an empty folder in its name. Received: output={uri!r}"
        )
    _require_deltalake()


def _require_deltalake() -> None:
    try:
        import deltalake  # noqa: F401 (only whether it is there)
    except ImportError as err:
        raise ConfigError(
            "a Delta table needs the package deltalake: pip install 'mnist_dist[delta]'. Received: table_format='delta'"
        ) from err


def delta_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a table in types that Delta has: unsigned integers become wider signed ones, lists of fixed size
    become lists, times are in µs.

    Raises:
        ConfigError: a column has no counterpart in Delta, or a name that its readers refuse.
    """
    for name in schema.names:
        if _FORBIDDEN.intersection(name):
            raise ConfigError(
                f"the names of a Delta table's columns have no space and none of ,;{{}}()=; rename the column or the "
                f"class, leave it out, or use --table-format parquet. Received: {name!r}"
            )
    converted = [pa.field(field.name, _delta_type(field.type, field.name), field.nullable) for field in schema]
    for field in converted:
        _check_known(field)
    return pa.schema(converted, schema.metadata)


def _check_known(field: pa.Field) -> None:
    """Raises ConfigError if deltalake has no type for a column."""
    _require_deltalake()
    from deltalake import Schema

    try:
        Schema.from_arrow(pa.schema([field]))
    except Exception as err:  # deltalake raises Exception itself
        raise _no_type(field.type, field.name) from err


def _no_type(kind: pa.DataType, column: str) -> ConfigError:
    return ConfigError(
        f"a Delta table has no type for the column {column!r}; leave it out, or use --table-format parquet. "
        f"Received: {kind}"
    )


def _delta_type(kind: pa.DataType, column: str) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", _delta_type(kind.value_type, column)))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _delta_type(field.type, column), field.nullable) for field in kind])
    if pa.types.is_dictionary(kind):
        return _delta_type(kind.value_type, column)
    if pa.types.is_timestamp(kind) and kind.tz:
        return pa.timestamp("us", tz="UTC")
    # Times without a zone and uuid are read by few: the first needs a feature of the table that not every table has.
    refused = (pa.types.is_uint64, pa.types.is_null, pa.types.is_timestamp, lambda kind: isinstance(kind, pa.UuidType))
    if any(is_kind(kind) for is_kind in refused):
        raise _no_type(kind, column)
    return _WIDER.get(kind, kind)


@dataclass(frozen=True)
class DeltaLog:
    """The log of one Delta table.

    Args:
        uri: the folder of the table.
        store: the store that holds it.
    """

    uri: str
    store: Store

    def publish(self, parts: Sequence[Part], *, schema: pa.Schema, number: int) -> None:
        """Makes these files the table in one transaction, unless a transaction of this number has done so.

        Args:
            parts: all files of the table, of which the log may know some.
            schema: the columns of every file.
            number: number of the version; greater than those of older versions.

        Raises:
            ConfigError: the package `deltalake` is missing.
            DataError: a file is missing, a later version is published, or others keep changing the table.
            ServiceError: the store failed.
        """
        _require_deltalake()
        for _ in range(CONFLICTS):
            table = self._open()
            published = (table.transaction_version(APPLICATION) or 0) if table is not None else 0
            if published > number:
                raise DataError(
                    f"version {published} of the Delta table is newer than what is to be published. "
                    f"Received: version {number} of {self.uri!r}"
                )
            if published == number or self._try_to_commit(table, parts, schema=schema, number=number):
                return
        raise DataError(f"the Delta table was changed by others {CONFLICTS} times in a row. Received: {self.uri!r}")

    def vacuum(self, names: Sequence[str], *, hours: int) -> int | None:
        """Deletes files that the newest version does not name and that are older than this; returns their number.

        Args:
            names: the files of the table by its mark.
            hours: the least age of a file, h.

        Returns:
            None: nothing is deleted, because another program has changed the table, and readers by the mark still need
            the files that it replaced.
        """
        from deltalake.exceptions import DeltaError

        table = self._open()
        if table is None or _names_in(table) != set(names):
            return None
        try:
            return len(table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True))
        except (DeltaError, OSError) as err:
            raise self._failure(err) from err

    def _open(self) -> "DeltaTable | None":
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            url, options = self.store.object_store_access(self.uri)
            return DeltaTable(url, storage_options=options)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as err:
            raise self._failure(err) from err

    def _try_to_commit(
        self, table: "DeltaTable | None", parts: Sequence[Part], *, schema: pa.Schema, number: int
    ) -> bool:
        """Commits through the given handle; False: another transaction was faster."""
        from deltalake import Schema
        from deltalake.exceptions import CommitFailedError, DeltaError
        from deltalake.transaction import CommitProperties, RemoveAction, Transaction, create_table_with_add_actions

        properties = CommitProperties(app_transactions=[Transaction(APPLICATION, number)], max_commit_retries=0)
        columns = Schema.from_arrow(schema)
        try:
            if table is None:
                url, options = self.store.object_store_access(self.uri)
                adds = [self._add(part) for part in parts]
                create_table_with_add_actions(
                    url, columns, adds, mode="error", storage_options=options, commit_properties=properties
                )
                return True
            before, now = _names_in(table), time.time_ns() // 1_000_000
            adds = [self._add(part) for part in parts if part.name not in before]
            if len(adds) == len(parts) and table.schema() != columns:  # No file is kept, so the columns may change.
                table.create_write_transaction(adds, "overwrite", columns, commit_properties=properties)
                return True
            gone = sorted(before - {part.name for part in parts})
            removes = [RemoveAction(name, data_change=True, deletion_timestamp=now) for name in gone]
            table.create_write_transaction([*adds, *removes], "append", table.schema(), commit_properties=properties)
        except CommitFailedError:
            return False
        except (DeltaError, OSError) as err:
            if table is None and self._open() is not None:
                return False  # Another driver created the table meanwhile.
            raise self._failure(err) from err
        return True

    def _add(self, part: Part) -> Any:
        from deltalake.transaction import AddAction

        try:
            entry = self.store.entry_of(join(self.uri, part.name))
        except FileNotFoundError as err:
            raise DataError(
                f"a file of the Delta table is gone; has another program vacuumed it? Restore it, or delete the folder "
                f"_work of the output to give this commit up. Received: {part.name!r} in {self.uri!r}"
            ) from err
        limits: Mapping[str, Any] = {"minValues": {"uri": part.min_uri}, "maxValues": {"uri": part.max_uri}}
        stats = {"numRecords": part.rows, **(limits if part.rows else {})}
        return AddAction(part.name, entry.size_bytes, {}, time.time_ns() // 1_000_000, True, json.dumps(stats))

    def _failure(self, err: Exception) -> ServiceError:
        return ServiceError(f"the log of the Delta table {self.uri} cannot be used: {first_line(err)}")


def _names_in(table: "DeltaTable") -> set[str]:
    return {uri.rpartition("/")[2] for uri in table.file_uris()}
