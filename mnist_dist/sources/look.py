"""A first look at the data of a job: what kind of images it is, from a few headers.

Owns: which images are looked at, and what they say together. Does not own: listing (`listing`), reading headers
(`source.probe_some`), or what follows from it (`commands/recipe_choice.py`).

Contract: at most `LISTED_IMAGES` files, lines or members of each input are listed, and one archive or Parquet file is
opened; `PROBED_IMAGES` of them are read. The same data always looks the same, and a few more images do not change it,
since medians count.
"""

from dataclasses import dataclass
from statistics import median_low

from mnist_dist.config import DataConfig
from mnist_dist.errors import DataError
from mnist_dist.sources.arrays import NAMED_ARRAYS
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.source import SMALL_SIDE_PX, input_config, open_source, probe_some
from mnist_dist.store.anywhere import ANYWHERE, check_access
from mnist_dist.store.base import Store

LISTED_IMAGES = 1_000
PROBED_IMAGES = 24
_DIGITS, _OTHER_ARRAYS = "digits", 28  # The other named data sets hold grey images of 28 x 28 px.


@dataclass(frozen=True)
class Look:
    """What the images look like: the medians of some of them."""

    width_px: int
    height_px: int
    channels: int
    """1: they are stored as grey; 3: in colour."""

    @property
    def are_small(self) -> bool:
        """Whether they are small enough to be trained on at their own size, by a network made for such images."""
        return max(self.width_px, self.height_px) <= SMALL_SIDE_PX

    def __str__(self) -> str:
        grey = self.channels == 1
        if self.are_small:
            kind = "small grey images" if grey else "small colour images"
        else:
            kind = "large grey images" if grey else "photographs"
        return f"{kind} of about {self.width_px} x {self.height_px} px"


def look_at(config: DataConfig, *, store: Store = ANYWHERE) -> Look | None:
    """Looks at the data of a job; None: none of the images that were looked at can be read.

    Args:
        config: the data.
        store: where it is.

    Raises:
        DataError: there is no such data, or no images.
        ServiceError, StorageError: see `store.base` and `check_access`.
    """
    inputs = tuple(name for name in config.data if name not in NAMED_ARRAYS)
    if not inputs:
        side_px = 8 if set(config.data) == {_DIGITS} else _OTHER_ARRAYS
        return Look(side_px, side_px, 1)
    check_access(inputs, store=store)
    try:
        wanted = input_config(DataConfig(data=inputs, image_column=config.image_column))
        listing = list_inputs(wanted, max_images=LISTED_IMAGES, store=store)
    except DataError:
        open_source(config, store=store)  # It says what is wrong with it as data of a training.
        raise
    probes, _ = probe_some(listing.table, count=PROBED_IMAGES, max_pixels=config.max_pixels, store=store)
    if not probes:
        return None
    return Look(*(median_low(probe[axis] for probe in probes) for axis in range(3)))
