"""Paths that are wrong: the message says what is there, what was probably meant, and what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
from scored import one_hot, scored_rows, write_bundle_info, write_scored

from mnist_dist.config import DataConfig
from mnist_dist.errors import BundleError, ConfigError, DataError, MnistDistError, ServiceError, StorageError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import check_named
from mnist_dist.evaluation.tables import open_table
from mnist_dist.importing.sources import find_source
from mnist_dist.inventory import rows_below
from mnist_dist.models.bundle import load_bundle, read_bundle_info
from mnist_dist.score_config import InputConfig
from mnist_dist.scoring.thresholds import read_thresholds
from mnist_dist.sources.arrays import read_arrays
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.places import check_outside
from mnist_dist.sources.source import open_source
from mnist_dist.store.anywhere import Anywhere
from mnist_dist.store.base import Level
from mnist_dist.store.memory import MemoryStore
from mnist_dist.store.surroundings import what_is_there


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with photographs, a table and labels."""
    for name in ("photos/cat/1.png", "photos/dog/2.png", "labels.csv", ".hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def in_memory(*names: str) -> Anywhere:
    store = MemoryStore()
    for name in names:
        store.write_bytes(f"memory://b/{name}", b"x")
    return Anywhere({"memory": store})


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("photso", "{0} holds photos/, labels.csv (did you mean {0}/photos?)"),
        ("PHOTOS", "{0} holds photos/, labels.csv (did you mean {0}/photos?)"),
        ("photso/cat", "{0} holds photos/, labels.csv (did you mean {0}/photos/cat?)"),
        ("photso/cow", "{0} holds photos/, labels.csv (did you mean {0}/photos?)"),
        ("label.csv", "{0} holds photos/, labels.csv (did you mean {0}/labels.csv?)"),
        ("xyz", "{0} holds photos/, labels.csv"),
        ("photos/cow/deep", "{0}/photos holds cat/, dog/"),
        ("photos", "{0}/photos holds cat/, dog/"),
        ("labels.csv/x", "{0}/labels.csv is a file"),
    ],
)
def test_the_nearest_folder_that_exists_is_shown(home: Path, name: str, said: str) -> None:
    assert what_is_there(str(home / name)) == f"; {said.format(home)}"


def test_a_relative_path_starts_where_the_person_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert what_is_there("photso") == f"; {home} holds photos/, labels.csv (did you mean {home}/photos?)"


def test_a_few_names_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").touch()
    assert what_is_there(str(tmp_path)) == f"; {tmp_path} holds 0.png, 1.png, 2.png, 3.png, 4.png and 3 more"
    (tmp_path / "empty").mkdir()
    assert what_is_there(str(tmp_path / "empty")) == f"; {tmp_path}/empty is empty"


def test_a_prefix_of_a_bucket_is_shown_as_well() -> None:
    store = in_memory("photos/cat/1.png", "runs/a")
    assert what_is_there("memory://b/photo/cat", store=store) == (
        "; memory://b holds photos/, runs/ (did you mean memory://b/photos/cat?)"
    )


class Counting(MemoryStore):
    """A store that keeps how many names were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int | None] = []

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        self.asked.append(max_names)
        return super().list_level(uri, max_names=max_names)


def test_a_folder_of_a_million_objects_is_not_listed() -> None:
    store = Counting()
    for number in range(1_200):
        store.write_bytes(f"memory://b/images/{number:07d}.png", b"x")
    said = what_is_there("memory://b/images/x.png", store=store)
    assert said.startswith("; memory://b/images holds 0000000.png, ")
    assert said.endswith(" and more")
    assert store.asked == [1_000, 1_000]


class Broken(MemoryStore):
    """A store whose listing fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        raise self._error


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), ServiceError("down"), StorageError("no bucket")])
def test_what_cannot_be_listed_adds_nothing(error: Exception) -> None:
    assert what_is_there("memory://b/x", store=Broken(error)) == ""
    assert what_is_there("https://host/x.csv") == ""
    assert what_is_there("memory://empty", store=in_memory()) == "; memory://empty is empty"


# --- every path that a person gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda path: list_inputs(InputConfig(input=(path,))), DataError),
        (lambda path: list_inputs(InputConfig(input=(f"{path}/*.png",))), DataError),
        (lambda path: open_source(DataConfig(data=(path,))), DataError),
        (lambda path: check_named(EvaluateJob(predictions="t", labels=f"{path}")), DataError),
        (lambda path: check_named(EvaluateJob(predictions="t", labels=f"{path}/l.csv")), DataError),
        (lambda path: open_table(path, bundle=None), DataError),
        (lambda path: read_arrays("mnist", path), DataError),
        (load_bundle, BundleError),
        (read_bundle_info, BundleError),
        (lambda path: read_thresholds(f"{path}.csv", ["a"]), ConfigError),
        (find_source, ConfigError),
        (lambda path: rows_below(path, lambda folder: None), StorageError),
    ],
)
def test_each_message_says_what_is_there(
    home: Path, call: Callable[[str], object], error: type[MnistDistError]
) -> None:
    with pytest.raises(error) as caught:
        call(str(home / "photso"))
    assert f"; {home} holds photos/, labels.csv (did you mean {home}/photos" in str(caught.value)


def test_a_mistyped_data_set_is_named() -> None:
    with pytest.raises(DataError, match=r"no data set of this name \(did you mean mnist\?\)"):
        list_inputs(InputConfig(input=("minst",)))


# --- bundles and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [load_bundle, read_bundle_info])
def test_a_keras_file_as_bundle_is_imported_first(tmp_path: Path, opened: Callable[[str], object]) -> None:
    (tmp_path / "model.keras").touch()
    for place, why in ((tmp_path / "model.keras", "a bundle is a folder, no file"), (tmp_path, "is unfinished")):
        words = rf"{why}.* becomes one by: mnist-dist import {place} --output BUNDLE\. Received: '{place}'"
        with pytest.raises(BundleError, match=words):
            opened(str(place))


@pytest.mark.parametrize("opened", [load_bundle, read_bundle_info])
def test_the_folder_of_a_run_leads_to_its_bundle(tmp_path: Path, opened: Callable[[str], object]) -> None:
    write_bundle_info(tmp_path / "bundle", ("a", "b"))
    with pytest.raises(BundleError, match=rf"did you mean {tmp_path}/bundle\?"):
        opened(str(tmp_path))


def test_the_folder_inside_of_an_output_leads_to_the_output(tmp_path: Path) -> None:
    output = write_scored(tmp_path / "out", scored_rows(["/1.png"], one_hot([0], 2), ("a", "b")))
    with pytest.raises(DataError, match=rf"there is no prediction table .*\(did you mean {output}\?\)"):
        open_table(f"{output}/table", bundle=None)
    with pytest.raises(DataError, match=rf"there is no prediction table .*; {tmp_path} holds out/\."):
        open_table(str(tmp_path), bundle=None)


def test_thresholds_of_unknown_classes_suggest_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("class,threshold\nCat,0.5\ndog,0.5\n")
    with pytest.raises(ConfigError, match=r"has the unknown 'Cat'; 'Cat' \(did you mean cat\?\)"):
        read_thresholds(str(tmp_path / "t.csv"), ["cat", "dog"])


# --- folders without classes, and outputs in the wrong place ---------------------------------------------------------


def test_a_folder_without_subfolders_says_what_it_found_and_what_is_expected(tmp_path: Path) -> None:
    for number in range(38):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(data=(str(tmp_path),)))
    assert "one subfolder per class (FOLDER/CLASS/IMAGE)" in str(caught.value)
    assert f"Received: 38 images without a class, no subfolders in {tmp_path}, " in str(caught.value)


def test_a_list_without_labels_says_its_columns(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"uri,target\n{tmp_path}/1.png,cat\n")
    (tmp_path / "1.png").touch()
    words = r"in a column \(--label-column\)\. Received: 1 images without a class, the columns target, input="
    with pytest.raises(DataError, match=words):
        open_source(DataConfig(data=(str(tmp_path / "l.csv"),)))


def test_a_folder_around_the_class_folders_is_noticed(home: Path) -> None:
    (home / "labels.csv").unlink()
    with pytest.raises(DataError, match=rf"two classes \(did you mean {home}/photos, which holds cat, dog\?\)"):
        open_source(DataConfig(data=(str(home),)))


@pytest.mark.parametrize(
    ("uri", "name", "remedy"),
    [
        ("/d/photos", "output", "; a folder beside it will do: --output /d/photos-predictions."),
        ("s3://b/photos/", "storage", "; a folder beside it will do: --storage s3://b/photos-runs."),
        ("/d/photos/**/*.png", "output", "; a folder beside it will do: --output /d/photos-predictions."),
        ("s3://b", "storage", "where the next run would list what is written."),
    ],
)
def test_an_output_in_the_photo_folder_is_refused_with_another(uri: str, name: str, remedy: str) -> None:
    folder = f"{uri.partition('/**')[0].rstrip('/')}/out"
    with pytest.raises(ConfigError) as caught:
        check_outside(folder, [uri], name=name)
    assert remedy in str(caught.value)
    assert str(caught.value).endswith(f"Received: {name}={folder!r}")


def test_a_report_into_the_labelled_images_is_refused(home: Path) -> None:
    job = EvaluateJob(predictions="t", labels=str(home / "photos"), output=str(home / "photos" / "report"))
    with pytest.raises(ConfigError, match=r"the output must lie outside of the input .*photos-predictions"):
        check_named(job)
