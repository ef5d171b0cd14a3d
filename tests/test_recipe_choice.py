"""The recipe that fits the data: picked where none is named, refused where it does not fit; nothing is trained here."""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mnist_dist
from mnist_dist.commands import recipe_choice, search, train
from mnist_dist.config import DataConfig, TrainJob
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.models.backbones import find_backbone
from mnist_dist.recipes import RECIPE_INFOS, SEARCH_RECIPES, TRAINING_RECIPES
from mnist_dist.score_config import InputConfig
from mnist_dist.sources import look
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.look import Look, look_at

SIZES = {"small": (12, 10), "cifar": (32, 32), "limit": (64, 64), "photos": (100, 75), "x-rays": (90, 120)}
GREY = ("small", "x-rays")


def write_images(root: Path, size: tuple[int, int], *, mode: str = "RGB", count: int = 6, first: int = 0) -> Path:
    """Images in the class folders `cat` and `dog`."""
    random = np.random.default_rng(1)
    width, height = size
    for number in range(first, first + count):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width) if mode == "L" else (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Callable[[str], str]:
    def named(name: str) -> str:
        return str(write_images(tmp_path / name, SIZES[name], mode="L" if name in GREY else "RGB"))

    return named


def chosen(*arguments: str) -> recipe_choice.Chosen:
    return train._chosen(arguments, "mnist-dist train")


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("small", "folder-cnn-bn", "small grey images of about 12 x 10 px"),
        ("cifar", "folder-cnn-bn", "small colour images of about 32 x 32 px"),
        ("limit", "folder-cnn-bn", "small colour images of about 64 x 64 px"),
        ("photos", "folder-mobilenet-v2", "photographs of about 100 x 75 px"),
        ("x-rays", "folder-mobilenet-v2", "large grey images of about 90 x 120 px"),
    ],
)
def test_data_without_a_recipe_gets_the_one_that_fits_and_a_line_that_says_so(
    data: Callable[[str], str], name: str, recipe: str, words: str
) -> None:
    found = chosen("--data", data(name), "--epochs", "3")
    assert (found.recipe, found.job.phases.epochs) == (recipe, (3,))
    assert found.job.model == TRAINING_RECIPES[recipe]().model
    assert found.why == f"{words}: recipe {recipe}; choose another with `train RECIPE`"


def test_without_data_the_included_digits_are_trained_on_without_a_word() -> None:
    found = chosen("--epochs", "2")
    assert (found.recipe, found.job.data.data, found.why) == ("quickstart", ("digits",), None)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("digits", "quickstart"),
        ("mnist", "mnist-cnn-bn"),
        ("fashion_mnist", "folder-cnn-bn"),
        ("emnist", "folder-cnn-bn"),
    ],
)
def test_named_data_sets_are_known_without_their_files(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "list_inputs", None)
    assert chosen("--data", name).recipe == recipe


def test_the_same_command_finds_its_run_again_after_a_few_images_more(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", (100, 75), count=20)
    before = chosen("--data", str(folder))
    write_images(folder, (16, 16), count=8, first=100)
    after = chosen("--data", str(folder))
    assert (after.recipe, after.job.settings_hash()) == (before.recipe, before.job.settings_hash())


@pytest.mark.parametrize(
    ("backbone", "recipe"),
    [
        ("vgg16", "folder-vgg16"),
        ("mobilenet_v2", "folder-mobilenet-v2"),
        ("xception", "folder-fine-tune"),
        ("cnn", "folder-cnn-bn"),
    ],
)
def test_a_backbone_that_is_named_decides_which_recipe_it_is(
    data: Callable[[str], str], backbone: str, recipe: str
) -> None:
    found = chosen("--data", data("photos"), "--backbone", backbone)
    assert (found.recipe, found.job.model.backbone) == (recipe, backbone)
    assert f"photographs of about 100 x 75 px, backbone {backbone}: recipe {recipe};" in str(found.why)


def test_an_imported_bundle_gets_a_new_head(
    data: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(tmp_path / "bundle")
    imported = replace(find_backbone("cnn"), imported=cast(Any, "its description"))
    monkeypatch.setattr(recipe_choice, "find_backbone", {bundle: imported}.__getitem__)
    found = chosen("--data", data("photos"), "--backbone", bundle)
    assert (found.recipe, found.job.phases.trainable) == ("folder-head", ("head",))
    with pytest.raises(ConfigError, match=r"folder-head needs --backbone: .* Received: recipe='folder-head'"):
        chosen("folder-head", "--data", data("photos"))


@pytest.mark.parametrize("recipe", ["quickstart", "mnist-cnn-bn", "mnist-vgg16", "folder-cnn-bn"])
def test_a_recipe_for_small_images_is_refused_for_photographs(data: Callable[[str], str], recipe: str) -> None:
    words = (
        rf"{recipe} is for small images, and --data .*/photos has photographs of about 100 x 75 px; .*`train folder-m"
    )
    with pytest.raises(ConfigError, match=words):
        chosen(recipe, "--data", data("photos"))


def test_a_misspelt_backbone_is_reported_before_the_data_is_looked_at() -> None:
    with pytest.raises(ConfigError, match=r"backbone must be one of .*Did you mean vgg16\? Received: backbone='vgg61'"):
        chosen("--data", "no-such-folder", "--backbone", "vgg61")


@pytest.mark.parametrize("flags", [("--backbone", "mobilenet_v2"), ("--image-size-px=96",)])
def test_who_chooses_the_network_may_take_any_recipe(data: Callable[[str], str], flags: tuple[str, ...]) -> None:
    assert chosen("quickstart", "--data", data("photos"), *flags).recipe == "quickstart"


@pytest.mark.parametrize("recipe", ["quickstart", "mnist-cnn", "folder-cnn-bn", "folder-mobilenet-v2"])
def test_small_images_may_be_trained_on_by_any_recipe(data: Callable[[str], str], recipe: str) -> None:
    found = chosen(recipe, "--data", data("small"))
    assert (found.recipe, found.why) == (recipe, None)


@pytest.mark.parametrize("recipe", [name for name, info in RECIPE_INFOS.items() if info.needs.endswith("(--data)")])
def test_a_recipe_that_needs_data_says_which_flag_is_missing(recipe: str) -> None:
    main = search.main if recipe in SEARCH_RECIPES else train.main
    with pytest.raises(ConfigError, match=rf"the recipe {recipe} needs --data: .* Received: data=None"):
        main([recipe], program="mnist-dist")


@pytest.mark.parametrize("recipe", [(), ("search-digits",), ("search-mnist",)])
def test_a_search_of_small_networks_is_refused_for_photographs(
    data: Callable[[str], str], recipe: tuple[str, ...]
) -> None:
    name, photos = recipe[0] if recipe else "search-digits", data("photos")
    with pytest.raises(ConfigError, match=rf"{name} is for small images.* there is `search search-backbones`"):
        search.main([*recipe, "--data", photos], program="mnist-dist search")
    with pytest.raises(ConfigError, match="search-digits is for small images"):
        mnist_dist.search(data=photos)


@pytest.mark.parametrize("flags", [(), ("quickstart",)])
def test_files_of_a_data_set_that_is_not_trained_on_are_a_mistake(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"trains on none of them: add --data mnist, .*Received: data_dir='idx'"):
        chosen(*flags, "--data-dir", "idx")
    assert chosen("mnist-mlp", "--data-dir", "idx").recipe == "mnist-mlp"


def test_a_python_call_picks_and_checks_like_the_command(
    data: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, TrainJob]] = []

    def run(job: TrainJob, recipe: str, shown: object) -> dict[str, Any]:
        begun.append((recipe, job))
        return {}

    monkeypatch.setattr(train, "run", run)
    mnist_dist.train(data=data("photos"), epochs=[2, 1])
    mnist_dist.train()
    assert [(recipe, job.phases.epochs) for recipe, job in begun] == [
        ("folder-mobilenet-v2", (2, 1)),
        ("quickstart", (15,)),
    ]
    with pytest.raises(ConfigError, match="quickstart is for small images"):
        mnist_dist.train("quickstart", data=[data("photos")])
    with pytest.raises(ConfigError, match="folder-vgg16 needs --data"):
        mnist_dist.train("folder-vgg16")


def test_a_name_that_is_not_there_is_said_as_a_training_says_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file, folder or prefix"):
        chosen("--data", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images were found"):
        chosen("--data", str(tmp_path / "empty"))


def test_images_of_which_none_can_be_read_need_a_recipe_by_name(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(
        ConfigError, match=r"none of the images that were looked at can be read.* name one: `train RECIPE`"
    ):
        chosen("--data", str(tmp_path))
    assert chosen("quickstart", "--data", str(tmp_path)).recipe == "quickstart"


# --- the look


def test_only_the_first_of_many_files_are_listed(data: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(data("photos"))
    write_images(folder / "later", (20, 20), count=30)
    monkeypatch.setattr(look, "LISTED_IMAGES", 5)
    listed = list_inputs
    tables: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        listing = listed(*arguments, **keywords)
        tables.append(len(listing.table))
        return listing

    monkeypatch.setattr(look, "list_inputs", counted)
    assert look_at(DataConfig(data=(str(folder),))) == Look(100, 75, 3)
    assert tables == [5]


def test_a_list_is_read_no_further_than_needed(data: Callable[[str], str], tmp_path: Path) -> None:
    images = sorted(Path(data("photos")).rglob("*.png"))
    lines = [*map(str, images[:2]), *(f"nowhere/{number}.png" for number in range(look.LISTED_IMAGES * 3))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert look_at(DataConfig(data=(str(tmp_path / "list.txt"),))) == Look(100, 75, 3)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_one_archive_is_opened_and_not_to_its_end(
    data: Callable[[str], str], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sorted(Path(data("cifar")).rglob("*.png"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", mode) as archive:  # type: ignore[call-overload]
            for image in images:
                archive.add(image, f"cat/{image.name}")
    (shards / "1.tar").write_bytes(b"another archive, which is damaged")
    whole = (shards / "0.tar").read_bytes()
    if mode == "w":
        (shards / "0.tar").write_bytes(whole[: len(whole) * 3 // 4] + b"x" * (len(whole) // 4))
    monkeypatch.setattr(look, "LISTED_IMAGES", 2)
    assert look_at(DataConfig(data=(str(shards),))) == Look(32, 32, 3)
    listing = list_inputs(InputConfig(input=(str(shards),)), max_images=2)
    assert (listing.archives, listing.table["status"].to_pylist()) == (1, [None, None])


def test_parquet_files_and_mixtures_are_looked_at(data: Callable[[str], str], tmp_path: Path) -> None:
    encoded = [path.read_bytes() for path in Path(data("photos")).rglob("*.png")]
    pq.write_table(pa.table({"image": encoded, "label": ["a", "b"] * 3}), tmp_path / "train.parquet")
    assert look_at(DataConfig(data=(str(tmp_path / "train.parquet"), "digits"))) == Look(100, 75, 3)


def test_the_median_decides(tmp_path: Path) -> None:
    write_images(tmp_path / "mixed", (300, 200), count=5)
    write_images(tmp_path / "mixed", (16, 16), mode="L", count=4, first=50)
    assert look_at(DataConfig(data=(str(tmp_path / "mixed"),))) == Look(300, 200, 3)


# --- what the help shows


def test_every_recipe_says_in_a_line_what_it_is_and_needs() -> None:
    assert RECIPE_INFOS.keys() == {*TRAINING_RECIPES, *SEARCH_RECIPES}
    for name, info in RECIPE_INFOS.items():
        assert 10 <= len(info.summary) <= 60, name
        assert info.needs


def test_what_a_recipe_needs_is_what_it_trains_on() -> None:
    recipes: dict[str, Callable[[], Any]] = {**TRAINING_RECIPES, **SEARCH_RECIPES}
    for name, build in recipes.items():
        data: DataConfig = build().data
        named = {"included": ("digits",), "mnist": ("mnist",)}.get(RECIPE_INFOS[name].data)
        assert named is None or data.data == named, name
