"""Lists, decodes and splits the images of a job, and plans the features of a frozen backbone.

Runs in the driver of training and of search. Imports neither TensorFlow nor Keras.
"""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mnist_dist.config import DataConfig, ModelConfig, TrainJob
from mnist_dist.console import Console
from mnist_dist.data.near_duplicates import find_near_duplicates
from mnist_dist.data.records import (
    RecordPlan,
    bad_records,
    fingerprint,
    plan_records,
    read_index,
    read_thumbnails,
)
from mnist_dist.data.splits import Splits, assign_splits, check_groups
from mnist_dist.errors import TooManyBadImages
from mnist_dist.models.backbones import backbone_size_px, check_size, find_backbone
from mnist_dist.on_ray.cluster import Resources, check_storage
from mnist_dist.on_ray.data.features import feature_actors, resolve_on_workers
from mnist_dist.on_ray.data.records import decode_missing
from mnist_dist.session import Session
from mnist_dist.sources.arrays import NAMED_ARRAYS
from mnist_dist.sources.columns import GROUP, LABEL, SPLIT
from mnist_dist.sources.label_sets import strata_of
from mnist_dist.sources.source import Source, image_spec, open_source
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, is_remote, join
from mnist_dist.training.features import FeaturePlan, plan_features

NAMED_BAD_IMAGES = 10
NOT_THE_IMAGES_FAULT = ("missing", "denied", "failed")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The listed images, and the plan for decoding them."""

    source: Source
    plan: RecordPlan


@dataclass(frozen=True, kw_only=True)
class DecodedData:
    """The decoded images."""

    source: Source
    plan: RecordPlan
    index: pa.Table
    """One row per image (`Records.index`)."""
    fingerprint: str
    bad: int
    """Number of unreadable images."""
    core_s: float = 0.0
    """Core-seconds spent on decoding in this run."""


def list_data(data: DataConfig, model: ModelConfig, *, root: str, console: Console, store: Store = ANYWHERE) -> Listed:
    """Lists the images and plans their decoding for a backbone; writes nothing.

    Raises:
        ConfigError: the data cannot be used, or not with this backbone.
    """
    return plan_data(open_data(data, console=console, store=store), data, model, root=root)


def open_data(data: DataConfig, *, console: Console, store: Store = ANYWHERE) -> Source:
    """Lists the images and prints their number.

    Raises:
        DataError: see `open_source`; or there are too few groups for three splits.
    """
    source = open_source(data, store=store)
    if data.group_by is not None:
        strata = strata_of(source.table[LABEL].to_numpy(), source.label_sets, len(source.class_names))
        check_groups(source.table[GROUP], source.table[SPLIT], pa.chunked_array([strata]), group_by=data.group_by)
    console.line(f"data: {source.name}, {source.table.num_rows:,} images of {len(source.class_names)} classes")
    for note in source.notes:
        console.line(f"  {note}")
    return source


def plan_data(source: Source, data: DataConfig, model: ModelConfig, *, root: str) -> Listed:
    """Plans how the listed images are decoded for a backbone.

    Raises:
        ConfigError: the images are too small for the backbone, or the disk is too small for them.
    """
    backbone = find_backbone(model.backbone)
    if backbone.imported is not None:
        spec = backbone.imported.spec
    else:
        follows_images = backbone.scratch and model.image_size_px is None
        spec = image_spec(source, backbone_size_px=backbone_size_px(model), scratch_size=follows_images, config=data)
        if follows_images:
            check_size(backbone, min(spec.height_px, spec.width_px))
    plan = plan_records(source, spec, storage=absolute(root), limits=data.limits)
    return Listed(source=source, plan=plan)


@contextmanager
def scratch_storage(place: str, *, is_shared: bool, name: str) -> Iterator[str]:
    """URI of a temporary folder, inside `place` if all nodes see that, else on this node; it is deleted afterwards.

    Args:
        place: URI of the folder to put it in.
        is_shared: whether all nodes see `place`, though it is local.
        name: its purpose, for the folder's name.
    """
    remote = is_remote(place) or is_shared
    uri = join(place, f"_{name}-{uuid.uuid4().hex}") if remote else tempfile.mkdtemp(prefix="mnist_dist-")
    try:
        yield absolute(uri)
    finally:
        ANYWHERE.delete_tree(uri)


def check_places(listed: Listed, data: DataConfig, *, root: str, is_shared: bool, nodes: int) -> None:
    """Raises ConfigError if some nodes of the cluster would not see the storage or the images."""
    check_storage(root, is_shared=is_shared, nodes=nodes)
    if listed.source.pixels is not None:
        return
    for name in data.data:
        if name not in NAMED_ARRAYS:
            check_storage(name, is_shared=is_shared, nodes=nodes, name="data")
        elif data.data_dir is not None:
            check_storage(data.data_dir, is_shared=is_shared, nodes=nodes, name="data_dir")


def decode(listed: Listed, data: DataConfig, session: Session) -> DecodedData:
    """Decodes the images that are not decoded yet, and reports the unreadable ones.

    Raises:
        TooManyBadImages: more than `data.max_bad_fraction` of the images are unreadable.
        Interrupted: SIGINT or SIGTERM; decoded shards are kept.
        ServiceError: the storage failed, not an image.
    """
    plan = listed.plan
    core_s = decode_missing(plan, listed.source, session)
    index = read_index(plan.cache)
    return DecodedData(
        source=listed.source,
        plan=plan,
        index=index,
        fingerprint=fingerprint(index, plan.class_names, plan.label_sets),
        bad=_judge_bad_images(index, plan, data, session),
        core_s=core_s,
    )


def _judge_bad_images(index: pa.Table, plan: RecordPlan, data: DataConfig, session: Session) -> int:
    """Prints the first unreadable images and gives their number; raises TooManyBadImages if there are too many."""
    bad = bad_records(index)
    if bad:
        session.once(f"{len(bad):,} unreadable images are left out")
    for uri, status, error in bad[:NAMED_BAD_IMAGES]:
        session.once(f"  {uri}: {status}: {error}")
    if len(bad) <= data.max_bad_fraction * index.num_rows:
        return len(bad)
    if any(status in NOT_THE_IMAGES_FAULT for _, status, _ in bad):
        session.confirm_lock()
        plan.cache.discard()  # The storage may be at fault, so the next run reads the images again.
    raise TooManyBadImages(
        f"{len(bad):,} of {index.num_rows:,} images are unreadable, such as {bad[0][0]} ({bad[0][1]}: {bad[0][2]}); "
        f"--max-bad-fraction allows {data.max_bad_fraction:.2%}; delete these images, or raise --max-bad-fraction"
    )


def split(decoded: DecodedData, data: DataConfig, *, console: Console) -> Splits:
    """Splits the readable images, and warns of what occurs in two splits, or nearly.

    Raises:
        ConfigError: a split or a class would be empty.
    """
    index = decoded.index
    splits = assign_splits(
        labels=index["label"].to_numpy().astype(np.int32),
        given=index["split"].to_pylist(),
        digests=np.array(index["digest"].to_pylist()).astype(np.bytes_),
        readable=np.array([status == "ok" for status in index["status"].to_pylist()]),
        uris=index["uri"].to_pylist(),
        class_names=decoded.source.class_names,
        config=data,
        groups=None if data.group_by is None else decoded.source.table[GROUP].to_pylist(),
        label_sets=decoded.source.label_sets,
    )
    if splits.spanning:
        first, second = splits.spanning_pair
        console.line(
            f"{splits.spanning} groups are in two of the splits that the data defines, such as {first} and {second}"
        )
    if splits.duplicates:
        duplicate, first = splits.duplicate_pairs[0]
        removed = "removed from the earlier one" if splits.dropped else "kept (--drop-duplicates removes them)"
        console.line(f"{splits.duplicates} images occur in two splits, such as {duplicate} and {first}: {removed}")
    return replace(splits, near_duplicates=_count_near_duplicates(decoded, splits, console=console))


def _count_near_duplicates(decoded: DecodedData, splits: Splits, *, console: Console) -> int:
    """Warns of images that look like one of another split, and gives their number."""
    thumbnails = read_thumbnails(decoded.plan)
    if thumbnails is None:
        return 0
    near = find_near_duplicates(thumbnails, splits.codes(len(thumbnails)), decoded.index["digest"].to_pylist())
    if near is None:
        return 0
    later, earlier = (decoded.index["uri"][row].as_py() for row in near.pair)
    console.line(
        f"warning: {near.count:,} images of validation or test look like one of another split (resized, encoded again "
        f"or cut a little), such as {later} and {earlier}. Results on them say little about new images: --group-by "
        "keeps what belongs together in one split; --drop-duplicates removes only what is equal."
    )
    return near.count


def plan_job_features(job: TrainJob, decoded: DecodedData, splits: Splits, *, have: Resources) -> FeaturePlan:
    """Plans the features of a frozen backbone for the training and validation images of a job.

    Args:
        job: the job, with an absolute path to its weights.
        decoded: its images.
        splits: their splits.
        have: the cluster's resources; its hardware decides what precision `auto` means.
    """
    backbone = job.model.backbone
    return plan_features(
        job.model,
        records=decoded.plan,
        index=decoded.index,
        rows=np.concatenate([splits.train, splits.val]),
        precision=resolve_on_workers(
            job.fit.precision, backbone=backbone, actors=feature_actors(have, backbone=backbone)
        ),
        stored_as=job.run.feature_type,
        seed=job.fit.seed,
        root=job.run.storage,
    )
