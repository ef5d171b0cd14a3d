"""Which recipe fits the data: picked where none is named, checked where one is.

Owns: the rule, and what is said about it. Does not own: the look at the data (`sources/look.py`), or the recipes.

The rule. Without `--data`, the default recipe trains on the included digits. With it, images of at most 64 px get a
small network that is trained from scratch at their own size, in grey or colour, and all larger ones a network with
ImageNet weights. A network that the flags choose (`--backbone`) is taken from the recipe that has it; any other one
with ImageNet weights is fine-tuned as a whole, one without them is trained from scratch, and an imported bundle gets a
new head. A named recipe for small images is refused for larger ones, unless the flags choose the network or its size.

Contract: the choice depends on the flags and on the data alone, so the same command finds its run again.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mnist_dist.config import DataConfig, StoreConfig, TrainJob, require
from mnist_dist.errors import ConfigError
from mnist_dist.models.backbones import find_backbone
from mnist_dist.recipes import RECIPE_INFOS, TRAINING_RECIPES
from mnist_dist.sources.arrays import NAMED_ARRAYS
from mnist_dist.sources.look import Look, look_at
from mnist_dist.store.anywhere import store_for
from mnist_dist.store.uris import shown

DEFAULT_TRAINING, DEFAULT_SEARCH = "quickstart", "search-digits"
FOR_ARRAYS = {("digits",): DEFAULT_TRAINING, ("mnist",): "mnist-cnn-bn"}
FROM_SCRATCH, FINE_TUNED, HEAD_ALONE = "folder-cnn-bn", "folder-fine-tune", "folder-head"
FOR_PHOTOGRAPHS = ("folder-mobilenet-v2", "folder-vgg16")
"""The first is picked, unless the flags name the backbone of another one."""
_CHOOSE_NETWORK = frozenset({"backbone", "backbones", "image_size_px", "space"})


@dataclass(frozen=True)
class Chosen:
    """A recipe, and the job that it makes with the flags."""

    recipe: str
    job: TrainJob
    why: str | None = None
    """One line for the user; None: the recipe was named, or is the default."""


def choose_training(build: Callable[[str | None], TrainJob], *, recipe: str | None, flags: Collection[str]) -> Chosen:
    """Picks the recipe of a training, or checks the one that is named.

    Args:
        build: makes the job of a recipe with the flags; None: of the default recipe.
        recipe: the name that the user gave.
        flags: names of the fields that the user gave.

    Raises:
        ConfigError: no such recipe or backbone, or the recipe does not fit the data.
        DataError: there is no such data.
        ServiceError, StorageError: see `store.base`.
    """
    job = build(recipe)
    if recipe is not None or "data" not in flags:
        check_fits(recipe or DEFAULT_TRAINING, job.data, job.store, flags=flags)
        return Chosen(recipe or DEFAULT_TRAINING, job)
    name, why = _pick(job, flags)
    return Chosen(name, build(name), f"{why}: recipe {name}; choose another with `train RECIPE`")


def check_fits(recipe: str, data: DataConfig, store: StoreConfig, *, flags: Collection[str]) -> None:
    """Checks that a recipe has data, and that it is made for such images.

    Args:
        recipe: the recipe's name.
        data: the data of its job, with the flags applied.
        store: how to reach the data.
        flags: names of the fields that the user gave.

    Raises:
        ConfigError: it does not fit; the message names a recipe that does.
        DataError: there is no such data.
        ServiceError, StorageError: see `store.base`.
    """
    info = RECIPE_INFOS[recipe]
    if "data" not in flags:
        require(
            info.data not in ("images", "small images"),
            f"the recipe {recipe} needs --data: a folder with one subfolder per class, a bucket prefix, archives, "
            "Parquet files or lists",
            data=None,
        )
        _check_data_dir(data, flags)
        return
    if recipe == HEAD_ALONE and "backbone" not in flags:
        raise ConfigError(
            f"the recipe {recipe} needs --backbone: the folder or bucket prefix of a bundle that `import` wrote. "
            f"Received: recipe={recipe!r}"
        )
    if info.data == "images" or _CHOOSE_NETWORK & set(flags):
        return
    look = look_at(data, store=store_for(store))
    if look is not None and not look.are_small:
        raise ConfigError(
            f"the recipe {recipe} is for small images, and --data {shown(data.data[0])} has {look}; for them there is "
            f"{_fitting(recipe)} (or choose the network: --backbone, --image-size-px). Received: recipe={recipe!r}"
        )


def _pick(job: TrainJob, flags: Collection[str]) -> tuple[str, str]:
    """The recipe that fits the data, and why."""
    if job.data.data in FOR_ARRAYS:
        return FOR_ARRAYS[job.data.data], f"data set {job.data.data[0]}"
    backbone = job.model.backbone if "backbone" in flags else None
    if backbone is not None:
        find_backbone(backbone)  # A misspelt one is the first thing to say.
    look = look_at(job.data, store=store_for(job.store))
    if look is None:
        raise ConfigError(
            "none of the images that were looked at can be read, so no recipe can be picked; name one: `train RECIPE`."
            f" Received: data={tuple(map(shown, job.data.data[:3]))}"
        )
    return _recipe_for(look, backbone), str(look) if backbone is None else f"{look}, backbone {shown(backbone)}"


def _recipe_for(look: Look, backbone: str | None) -> str:
    if backbone is None:
        return FROM_SCRATCH if look.are_small else FOR_PHOTOGRAPHS[0]
    row = find_backbone(backbone)
    if row.imported is not None:
        return HEAD_ALONE
    if row.weights_published is None:
        return FROM_SCRATCH
    named = (name for name in FOR_PHOTOGRAPHS if TRAINING_RECIPES[name]().model.backbone == backbone)
    return next(named, FINE_TUNED)


def _fitting(recipe: str) -> str:
    """What to use instead of a recipe for small images."""
    return "`search search-backbones`" if recipe not in TRAINING_RECIPES else f"`train {FOR_PHOTOGRAPHS[0]}`"


def _check_data_dir(data: DataConfig, flags: Collection[str]) -> None:
    """Files of a data set that is not trained on are a mistake."""
    read = [name for name in data.data if name in NAMED_ARRAYS and name != "digits"]
    require(
        bool(read) or "data_dir" not in flags,
        "--data-dir has the files of a named data set, and this recipe trains on none of them: add --data mnist, or "
        "choose a recipe such as mnist-cnn-bn",
        data_dir=data.data_dir,
    )
