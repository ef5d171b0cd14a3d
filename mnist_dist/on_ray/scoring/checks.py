"""Checks of a scoring job before it starts, so that it fails early and says why."""

import shutil

import psutil
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.models.bundle import Bundle
from mnist_dist.on_ray.cluster import check_storage
from mnist_dist.score_config import ScoreJob
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.predictions import fits, table_schema
from mnist_dist.store.uris import are_remote, is_remote

ROW_BYTES = 400  # of a row on disk, without probabilities and embeddings
PROCESS_BYTES = 2**30  # memory of an actor, without its model
MODEL_COPIES = 4  # copies of the weights in an actor: file, Keras, constants, scratch


def check_found(
    job: ScoreJob, table: pa.Table, output: Output, *, schema: pa.Schema, keep_old: bool, nodes: int
) -> None:
    """Checks the listed images before they are scored.

    Args:
        job: the job.
        table: `image_table.COLUMNS`, then the carried columns.
        output: the folder of the table.
        schema: the columns of the table.
        keep_old: whether rows of the existing table are kept.
        nodes: number of nodes in the cluster.

    Raises:
        ConfigError: not all nodes see the images, the images include the output, or their columns do not fit the table.
    """
    if keep_old and not fits(table_schema(output.uri, store=output.store), schema):
        raise ConfigError(
            f"the existing table has other columns, or columns of other types; --mode fresh makes a new table. "
            f"Received: {', '.join(schema.names)}"
        )
    uris = table["uri"]
    inside = uris.filter(pc.starts_with(uris, pattern=f"{output.uri}/"))
    if len(inside):
        raise ConfigError(
            f"the output must not hold images of the input, such as {inside[0].as_py()!r}. "
            f"Received: output={job.output!r}"
        )
    # What is read is the container, where there is one; a row with a status is not read, nor is an embedded data set.
    read = pc.coalesce(table["archive"], uris).filter(pc.is_null(table["status"]))
    local = read.filter(pc.and_(pc.invert(are_remote(read)), pc.not_equal(read, "")))
    if len(local):
        check_storage(local[0].as_py(), is_shared=job.run.storage_is_shared, nodes=nodes, name="input")


def check_room(job: ScoreJob, bundle: Bundle, *, rows: int, output: str, actors: int) -> None:
    """Checks the free memory and disk of this node before the job starts.

    Raises:
        ResourceError: there is less than the job needs, by a rather low estimate.
    """
    weights = bundle.model_path.stat().st_size
    needed = actors * (PROCESS_BYTES + MODEL_COPIES * weights)
    free = psutil.virtual_memory().available
    if free < needed:
        raise ResourceError(
            f"{actors} actor(s) need about {needed / 1e9:.1f} GB of memory. Received: {free / 1e9:.1f} GB free"
        )
    if is_remote(output):
        return
    row_bytes = ROW_BYTES + 4 * len(bundle.info.class_names)
    needed, free = 2 * rows * row_bytes, shutil.disk_usage(output).free  # twice: the shards, and the files made of them
    if free < needed:
        raise ResourceError(
            f"{rows:,} rows need about {needed / 1e9:.1f} GB of disk while they are written. "
            f"Received: {free / 1e9:.1f} GB free below {output!r}"
        )
