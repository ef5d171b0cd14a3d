"""Opens the validation images of the runs whose bundles are combined.

Owns: which images these are, and that no member was trained on one of them. Does not own: listing, decoding and
splitting (`on_ray/data`), or measuring (`combining/measuring.py`).

The images are listed and split by what the first bundle says of its run; their fingerprint has to be that of each
bundle. So the validation images are those of the runs, to the image. Ray starts only where they are not decoded yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mnist_dist.combine_config import CombineJob
from mnist_dist.combining.measuring import LabelledImages
from mnist_dist.config import DataConfig, differences
from mnist_dist.data.records import RecordPlan, plan_records
from mnist_dist.errors import ConfigError
from mnist_dist.models.bundle import BundleInfo
from mnist_dist.on_ray.cluster import connected
from mnist_dist.on_ray.data.features import node_folder
from mnist_dist.on_ray.data.prepare import DecodedData, Listed, check_places, decode, open_data, split
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE, store_for
from mnist_dist.store.uris import absolute

_SPLITTING = ("validation_fraction", "test_fraction", "group_by", "drop_duplicates", "skip", "limit")
"""What decides, beside the images, which of them are trained on."""
_NO_FINGERPRINT = "none"


def open_validation(job: CombineJob, infos: Sequence[BundleInfo], session: Session) -> LabelledImages:
    """Lists the images of the runs, decodes what is not decoded yet, and gives the validation split.

    Args:
        job: says where the images are now, if not where they were.
        infos: what the bundles say.
        session: of the job.

    Raises:
        ConfigError: it is not known what the first bundle was trained on, or another one was trained on other images.
        DataError, TooManyBadImages: see `on_ray.data.prepare`.
    """
    first, data = infos[0], data_config(job, infos)
    source = open_data(data, console=session.console, store=store_for(job.store))
    if source.class_names != first.class_names:
        raise ConfigError(
            f"the images must have the classes of the bundles, {_few(first.class_names)}. "
            f"Received: {_few(source.class_names)} in {source.name}"
        )
    plan = plan_records(source, first.spec, storage=absolute(job.storage), limits=data.limits)
    decoded = _decoded(Listed(source=source, plan=plan), data, job, session)
    for number, info in enumerate(infos, start=1):
        if info.data_fingerprint not in (_NO_FINGERPRINT, decoded.fingerprint):
            raise ConfigError(
                "the validation images must be those of the runs, or some were trained on: bundle "
                f"{number} ({info.model_id[:12]}) was trained on other images than these. Take method soup or ensemble "
                f"without --data, or say where its images are (--data). Received: {source.name}"
            )
    splits = split(decoded, data, console=session.console)
    return images_of(plan, splits.val, fingerprint=decoded.fingerprint)


def images_of(plan: RecordPlan, rows: npt.NDArray[np.int64], *, fingerprint: str) -> LabelledImages:
    """The decoded images of a split, `int64 [n]`, for any process on this node."""
    return LabelledImages(records=plan, rows=rows, fingerprint=fingerprint, local_dir=node_folder())


def data_config(job: CombineJob, infos: Sequence[BundleInfo]) -> DataConfig:
    """What the first bundle was trained on, as its run recorded it, at the place that the job names.

    Raises:
        ConfigError: it is not recorded and the job names nothing, or another bundle's run split its images otherwise.
    """
    recorded = _recorded(infos[0])
    for number, info in enumerate(infos[1:], start=2):
        lines = differences(_splitting(_recorded(info)), _splitting(recorded))
        if lines:
            raise ConfigError(
                f"the runs must have split their images alike, or some validation images were trained on: "
                f"{'; '.join(lines)} of the first bundle. Received: bundle {number} ({info.model_id[:12]})"
            )
    if recorded is None and not job.data:
        raise ConfigError(
            "the first bundle does not say what it was trained on: name its images with --data. "
            f"Received: {infos[0].backbone} {infos[0].model_id[:12]}"
        )
    config = DataConfig() if recorded is None else msgspec.convert(dict(recorded), DataConfig)
    return replace(config, data=job.data or config.data, data_dir=job.data_dir or config.data_dir)


def _recorded(info: BundleInfo) -> Mapping[str, Any] | None:
    """The settings of the data of a bundle's run; None: it was imported."""
    return info.config.get("data")


def _splitting(recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    values = DataConfig() if recorded is None else msgspec.convert(dict(recorded), DataConfig)
    return {name: getattr(values, name) for name in _SPLITTING}


def _decoded(listed: Listed, data: DataConfig, job: CombineJob, session: Session) -> DecodedData:
    """The decoded images; Ray decodes what is missing."""
    if listed.source.pixels is not None or listed.plan.cache.is_finished():
        return decode(listed, data, session)
    ANYWHERE.check_writable(job.storage)
    with connected(verbose=job.verbose, stop=session.stop) as resources:
        check_places(listed, data, root=job.storage, is_shared=job.storage_is_shared, nodes=resources.nodes)
        return decode(listed, data, session)


def _few(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
