"""work: what a generation scores, against tables that were really committed."""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import colour_png, tar_of
from scored import described_by, plan_of

from mnist_dist.errors import DataError
from mnist_dist.score_config import InputConfig, ScoreJob, TableConfig
from mnist_dist.scoring.commit import commit
from mnist_dist.scoring.generations import Committed, Output
from mnist_dist.scoring.manifest import Manifest, write_manifest
from mnist_dist.scoring.predictions import Outcomes, prediction_rows, prediction_schema, read_predictions
from mnist_dist.scoring.selection import Selection, select_images
from mnist_dist.sources.image_table import COLUMNS
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import is_remote, join

NOW = datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)
CLASSES = ("ant", "bee")
SHARD_SIZE = 3
ALL = TableConfig()


class Place:
    """A folder or prefix with images, and the table made of them.

    Args:
        root: its URI.
        carry: of the inputs.
        table: which columns the table has.
    """

    def __init__(self, root: str, *, carry: tuple[str, ...] = (), table: TableConfig = ALL) -> None:
        self.root, self.carry, self.table = root, carry, table
        self.output = Output(join(root, "output"))

    def put(self, name: str, data: bytes = b"an image") -> str:
        uri = join(self.root, name)
        ANYWHERE.write_bytes(uri, data)
        return uri

    def find(
        self, *inputs: str, before: Committed | None = None, include: tuple[str, ...] = (), **settings: Any
    ) -> Selection:
        job = ScoreJob(
            bundle="b",
            output=self.output.uri,
            inputs=InputConfig(
                input=inputs or (join(self.root, "images"),),
                carry=self.carry,
                include=include,
                all_files=settings.pop("all_files", False),
            ),
            table=self.table,
            **settings,
        )
        return select_images(job, self.output, before=before or self.output.committed())

    def score(self, work: Selection, bad: Mapping[str, str] | None = None) -> None:
        """Makes rows of the work, ok but for the statuses in `bad`, and commits them."""
        assert len(work.table)
        generation = self.output.new_generation(plan_of(), fence=self.output.max_number() + 1)
        generation.begin(lambda uri: write_manifest(uri, work.table, shard_size=SHARD_SIZE))
        with Manifest(generation.manifest_uri) as manifest:
            schema = prediction_schema(self.table, carried=manifest.carried)
            for shard in range(manifest.shards):
                rows = self._scored(schema, manifest.read(shard), bad or {})
                with ANYWHERE.new_object(generation.shard_uri(shard)) as file:
                    pq.write_table(rows, file)
            shards = manifest.shards
        commit(
            self.output,
            generation,
            fence=generation.number,
            shards=shards,
            schema=schema,
            judge=lambda counts, rows: True,
            description=described_by(("a", "b")),
            images_per_s=None,
            check=lambda: None,
            progress=lambda done, total: None,
        )

    def _scored(self, schema: pa.Schema, rows: pa.Table, bad: Mapping[str, str]) -> pa.Table:
        """As a scoring job would: what was read tells its size and etag, also where no listing did."""
        uris, count = rows["uri"].to_pylist(), len(rows)
        known = rows["status"].to_pylist()
        statuses = [bad.get(uri.removeprefix(f"{self.root}/"), known[row] or "ok") for row, uri in enumerate(uris)]
        entries = [self._read(row) for row in rows.to_pylist()]
        outcomes = Outcomes(
            status=statuses,
            error=[None if status == "ok" else "it is bad" for status in statuses],
            width=np.full(count, 7, np.int32),
            height=np.full(count, 5, np.int32),
            size_bytes=[entry["size_bytes"] for entry in entries],
            etag=[entry["etag"] for entry in entries],
            probabilities=np.full((count, len(CLASSES)), 0.5, np.float32),
        )
        carried = rows.drop_columns([*COLUMNS.names, "shard"])
        return prediction_rows(
            schema,
            uris=rows["uri"],
            outcomes=outcomes,
            class_names=CLASSES,
            top_k=0,
            model_id="m",
            scored_at=NOW,
            carried=carried,
            other_files=rows["other_file"],
        )

    @staticmethod
    def _read(row: dict[str, Any]) -> dict[str, Any]:
        if row["archive"] is not None or row["status"] is not None:
            return row
        try:
            entry = ANYWHERE.entry_of(row["uri"])
        except (FileNotFoundError, PermissionError):
            return {"size_bytes": None, "etag": None}
        return {"size_bytes": entry.size_bytes, "etag": entry.etag}

    def names(self, work: Selection) -> list[str]:
        return [uri.removeprefix(f"{self.root}/") for uri in work.table["uri"].to_pylist()]

    def statuses(self) -> dict[str, str]:
        rows = read_predictions(self.output.uri, columns=["uri", "status"]).to_pylist()
        return {row["uri"].removeprefix(f"{self.root}/"): row["status"] for row in rows}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_at(str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """As `place`, for what is the same wherever it lies."""
    return place_at(str(tmp_path))


def place_at(root: str) -> Place:
    place = Place(root)
    for name in ("a", "b", "c", "d"):
        place.put(f"images/{name}.png", name.encode() * 10)
    return place


# --- everything ------------------------------------------------------------------------------------------------------


def test_without_a_table_everything_is_scored(place: Place) -> None:
    for settings in ({}, {"mode": "incremental"}, {"mode": "fresh"}, {"retry_failed": True}):
        work = place.find(**settings)
        assert place.names(work) == [f"images/{name}.png" for name in "abcd"]
        assert work.listing is not None
        assert work.table.schema.equals(COLUMNS)


def test_a_fresh_start_scores_everything_again(folder: Place) -> None:
    folder.score(folder.find())
    work = folder.find(mode="fresh")
    assert folder.names(work) == [f"images/{name}.png" for name in "abcd"]


def test_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    told: list[int] = []
    job = ScoreJob(bundle="b", output=str(tmp_path / "out"), inputs=InputConfig(input=(str(tmp_path),)))
    select_images(job, Output(job.output), before=None, progress=told.append)
    assert told[-1] == 1


def test_nothing_to_list_is_an_error_in_every_mode(folder: Place) -> None:
    folder.score(folder.find())
    for mode in ("incremental", "fresh"):
        with pytest.raises(DataError, match="there is no such file"):
            folder.find(join(folder.root, "nowhere"), mode=mode)


# --- increments ------------------------------------------------------------------------------------------------------


def test_an_increment_is_what_is_new_or_changed(place: Place) -> None:
    place.score(place.find())
    place.put("images/0.png", b"new")
    place.put("images/b.png", b"changed")
    ANYWHERE.delete(join(place.root, "images/c.png"))
    work = place.find(mode="incremental")
    assert place.names(work) == ["images/0.png", "images/b.png"]
    place.score(work)
    assert place.statuses() == {f"images/{name}.png": "ok" for name in "0abcd"}  # the row of what is gone stays
    assert place.names(place.find(mode="incremental")) == []


def test_a_change_of_the_same_size_is_a_change(place: Place) -> None:
    place.score(place.find())
    uri = place.put("images/b.png", b"B" * 10)
    if not is_remote(uri):
        os.utime(uri, (1, 1))  # a clock that ticks slowly would show the time of before
    assert place.names(place.find(mode="incremental")) == ["images/b.png"]


def test_a_bad_row_that_did_not_change_is_not_scored_again(folder: Place) -> None:
    folder.score(folder.find(), bad={"images/a.png": "unreadable", "images/b.png": "failed"})
    assert len(folder.find(mode="incremental").table) == 0


def test_an_increment_may_be_of_other_inputs(folder: Place) -> None:
    folder.score(folder.find())
    other = folder.put("more/a.png")
    work = folder.find(other, join(folder.root, "images/a.png"), mode="incremental")
    assert folder.names(work) == ["more/a.png"]
    folder.score(work)
    assert len(folder.statuses()) == 5


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tgz", "w:gz")])
def test_all_members_of_an_archive_that_changed_are_scored(place: Place, name: str, mode: str) -> None:
    one, two, three = (colour_png(level, 0, 0) for level in range(3))
    place.put(f"images/{name}", tar_of({"1.png": one, "2.png": two}, mode))
    place.score(place.find())
    assert len(place.find(mode="incremental").table) == 0
    place.put(f"images/{name}", tar_of({"1.png": one, "2.png": two, "3.png": three}, mode))
    work = place.find(mode="incremental")
    assert place.names(work) == [f"images/{name}!{number}.png" for number in (1, 2, 3)]
    place.score(work)
    assert len(place.statuses()) == 7


def test_a_damaged_archive_is_known(folder: Place) -> None:
    whole = tar_of({"1.png": b"first", "2.png": bytes(900)})
    folder.put("images/x.tar", whole[: 3 * 512 + 100])
    folder.score(folder.find())
    assert folder.statuses()["images/x.tar"] == "truncated"
    assert len(folder.find(mode="incremental").table) == 0
    folder.put("images/x.tar", whole)
    assert folder.names(folder.find(mode="incremental")) == ["images/x.tar!1.png", "images/x.tar!2.png"]


def listed(place: Place, *names: str, **columns: Any) -> str:
    """A list of images in Parquet."""
    uri = join(place.root, "list.parquet")
    with ANYWHERE.new_object(uri) as file:
        pq.write_table(pa.table({"uri": [join(place.root, name) for name in names], **columns}), file)
    return uri


def test_what_a_list_names_is_looked_up(place: Place) -> None:
    names = [f"images/{name}.png" for name in ("a", "b", "d", "nowhere")]
    uri = listed(place, *names)
    first = place.find(uri)
    assert place.names(first) == names
    if is_remote(place.root):
        assert first.table["etag"].null_count == 4
    place.score(first, bad={names[3]: "missing"})
    assert len(place.find(uri, mode="incremental").table) == 0
    place.put("images/a.png", b"changed")
    place.put("images/nowhere.png", b"there now")
    work = place.find(uri, mode="incremental")
    assert place.names(work) == [names[0], names[3]]
    entries = [ANYWHERE.entry_of(found) for found in work.table["uri"].to_pylist()]
    assert work.table["etag"].to_pylist() == [entry.etag for entry in entries]
    assert work.table["size_bytes"].to_pylist() == [7, 9]
    assert work.table.schema.equals(COLUMNS)


def test_what_is_no_address_of_an_image_is_not_looked_up(folder: Place, s3: str) -> None:
    uri = listed(folder, "images/a.png")
    with ANYWHERE.new_object(uri) as file:
        pq.write_table(pa.table({"uri": ["s3://bucket", "ftp://bucket/a.png", f"{s3}/a.tar", "s3:///a.png"]}), file)
    folder.score(folder.find(uri))
    assert set(folder.statuses().values()) == {"unsupported", "missing"}
    assert len(folder.find(uri, mode="incremental").table) == 0


def test_an_increment_carries_columns(folder: Place) -> None:
    folder.carry = ("label",)
    folder.score(folder.find(listed(folder, "images/a.png", "images/b.png", label=[3, 1])))
    work = folder.find(
        listed(folder, "images/b.png", "images/c.png", "images/a.png", label=[5, None, 7]), mode="incremental"
    )
    assert folder.names(work) == ["images/c.png"]
    assert work.table["label"].to_pylist() == [None]
    folder.score(work)
    assert read_predictions(folder.output.uri)["label"].to_pylist() == [3, 1, None]


# --- again what failed -----------------------------------------------------------------------------------------------

BAD = {"images/a.png": "failed", "images/b.png": "unsupported", "images/d.png": "missing"}


def test_bad_rows_are_scored_again(place: Place) -> None:
    place.score(place.find(), bad=BAD)
    place.put("images/0.png", b"new, and not looked at")
    work = place.find(retry_failed=True)
    assert place.names(work) == ["images/a.png", "images/b.png", "images/d.png"]
    place.score(work, bad={"images/d.png": "denied"})
    assert place.statuses() == {
        "images/a.png": "ok",
        "images/b.png": "ok",
        "images/c.png": "ok",
        "images/d.png": "denied",
    }
    assert place.names(place.find(retry_failed=True)) == ["images/d.png"]


def test_without_bad_rows_there_is_nothing_to_do(folder: Place) -> None:
    folder.put("images/notes.txt")
    folder.score(folder.find(all_files=True), bad={"images/notes.txt": "unsupported"})
    assert folder.statuses()["images/notes.txt"] == "other_file"
    work = folder.find(all_files=True, retry_failed=True)
    assert (work.listing, len(work.table)) == (None, 0)
    assert work.table.schema.equals(COLUMNS)


def test_what_does_not_claim_to_be_an_image_does_not_when_it_is_scored_again(place: Place) -> None:
    for name in ("found.txt", "listed.txt"):
        place.put(f"images/{name}")
    inputs = (join(place.root, "images"), listed(place, "images/listed.txt"))
    bad = dict.fromkeys(("images/a.png", "images/found.txt", "images/listed.txt"), "failed")
    place.score(place.find(*inputs, all_files=True), bad=bad)
    assert place.statuses().items() >= bad.items()
    work = place.find(*inputs, all_files=True, retry_failed=True)
    assert dict(zip(place.names(work), work.table["other_file"].to_pylist(), strict=True)) == {
        "images/a.png": None,
        "images/found.txt": True,
        "images/listed.txt": None,
    }
    place.score(work, bad=dict.fromkeys(bad, "truncated"))
    assert (
        place.statuses().items()
        >= {
            "images/a.png": "truncated",
            "images/found.txt": "other_file",
            "images/listed.txt": "truncated",
        }.items()
    )


def test_a_whole_archive_is_looked_at_again(place: Place) -> None:
    whole = tar_of({"1.png": b"first", "2.png": b"second", "old.jpg": b"3", "4.png": b"fourth", "n.txt": b"text"})
    place.put("images/x.tar", whole[: 5 * 512])
    include = ("*.tar", "*.png")
    place.score(place.find(include=include))
    assert place.statuses()["images/x.tar"] == "truncated"
    place.put("images/x.tar", whole)
    place.put("images/new.png", b"not looked at")
    work = place.find(include=include, retry_failed=True)
    assert place.names(work) == [f"images/x.tar!{name}.png" for name in (1, 2, 4)]
    assert work.gone is not None
    assert work.gone.to_pylist() == [join(place.root, "images/x.tar")]


def test_an_archive_that_is_still_damaged_keeps_its_row_and_its_good_members(place: Place) -> None:
    place.put("images/x.tar", tar_of({"1.png": b"first", "2.png": b"second"})[: 2 * 512 + 100])
    place.score(place.find())
    work = place.find(retry_failed=True)
    assert (place.names(work), work.table["status"].to_pylist()) == (["images/x.tar"], ["truncated"])
    assert not work.gone


def test_members_are_scored_again(place: Place) -> None:
    whole = tar_of({"1.png": b"first", "2.png": b"second", "3.png": bytes(900)})
    place.put("images/x.tar", whole[: 5 * 512 + 100])
    place.score(place.find(), bad={"images/x.tar!2.png": "failed", "images/c.png": "failed"})
    bad = {name for name, status in place.statuses().items() if status != "ok"}
    assert bad == {"images/c.png", "images/x.tar", "images/x.tar!2.png", "images/x.tar!3.png"}
    work = place.find(retry_failed=True)
    assert place.names(work) == ["images/c.png", "images/x.tar", "images/x.tar!2.png", "images/x.tar!3.png"]
    rows = work.table.to_pylist()
    assert [(row["packing"], row["offset"], row["status"]) for row in rows[:3]] == [
        (None, None, None),
        (None, None, "truncated"),
        ("tar", 3 * 512, None),
    ]


def test_a_bad_row_whose_image_is_gone_stays_a_row(folder: Place) -> None:
    folder.put("images/x.tar", tar_of({"1.png": b"first", "2.png": b"second"}))
    folder.score(folder.find(), bad={"images/a.png": "failed", "images/x.tar!1.png": "failed"})
    ANYWHERE.delete(join(folder.root, "images/a.png"))
    folder.put("images/x.tar", tar_of({"2.png": b"second"}))
    work = folder.find(retry_failed=True)
    assert folder.names(work) == ["images/a.png", "images/x.tar!1.png"]
    assert [row["status"] for row in work.table.to_pylist()] == [None, "missing"]


def test_what_a_row_carries_is_kept_when_it_is_scored_again(place: Place) -> None:
    place.carry, place.table = ("label", "when"), TableConfig(columns=("confidence",))
    days = pa.array([1, None, 3, 4], pa.date32())
    names = [f"images/{name}.png" for name in "badc"]
    place.score(place.find(listed(place, *names, label=["x", "y", None, "z"], when=days)), bad=BAD)
    ANYWHERE.delete(join(place.root, "list.parquet"))
    work = place.find(retry_failed=True)
    assert dict(zip(place.names(work), work.table["label"].to_pylist(), strict=True)) == {
        "images/a.png": "y",
        "images/b.png": "x",
        "images/d.png": None,
    }
    assert work.table.schema.field("when").type == pa.date32()
    before = read_predictions(place.output.uri).sort_by("uri").select(["uri", "label", "when"])
    place.score(work)
    assert read_predictions(place.output.uri).sort_by("uri").select(["uri", "label", "when"]).equals(before)


def test_names_that_mean_something_elsewhere_are_only_names(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    names = [f"images/{name}.png" for name in ("a b", "c*[d]?", "e!f", "ä#%20", "- g")]
    for name in names:
        place.put(name)
    place.score(place.find(), bad=dict.fromkeys(names, "failed"))
    assert sorted(place.names(place.find(retry_failed=True))) == sorted(names)
