"""What a scoring job looks at before its work, so that it fails early and says why."""

import shutil

import psutil
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import ScoreJob
from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.models.bundle import MODEL_FILE, Bundle
from mnist_dist.on_ray.cluster import check_storage
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.manifest import carried_schema
from mnist_dist.scoring.predictions import fits, prediction_schema, table_schema
from mnist_dist.store.uris import absolute, are_remote, is_remote

ROW_BYTES = 400  # of a row on disk, beside probabilities and embeddings
PROCESS_BYTES = 2**30  # of an actor, beside its model
MODEL_COPIES = 4  # of the weights in an actor: file, Keras, constants, scratch


def check_output_is_outside(job: ScoreJob) -> None:
    """A table inside of what is listed would be listed the next time."""
    output = absolute(job.output)
    for uri in job.inputs.input:
        if uri != "-" and f"{output}/".startswith(f"{absolute(uri).rstrip('/')}/"):
            raise ConfigError(f"the output lies outside of the input {uri!r}. Received: output={job.output!r}")


def check_found(job: ScoreJob, table: pa.Table, output: Output, *, keep_old: bool, nodes: int) -> None:
    """Looks at what was found, before the work.

    Args:
        job: what is scored.
        table: `manifest.COLUMNS`, then the carried columns.
        output: where the table is to be.
        keep_old: rows of the table there stay.
        nodes: of the cluster.

    Raises:
        ConfigError: the images cannot be seen by all nodes, hold the output, or do not fit the table there.
    """
    schema = prediction_schema(job.table, carried=carried_schema(table))
    if keep_old and not fits(table_schema(output.uri), schema):
        raise ConfigError(
            f"the table there has other columns, or carries other types; --mode fresh makes it anew. "
            f"Received: {', '.join(schema.names)}"
        )
    uris = table["uri"]
    inside = uris.filter(pc.starts_with(uris, pattern=f"{output.uri}/"))
    if len(inside):
        raise ConfigError(
            f"the output lies outside of the input, which names {inside[0].as_py()!r}. Received: output={job.output!r}"
        )
    local = uris.filter(pc.invert(are_remote(uris)))
    if len(local):
        check_storage(local[0].as_py(), is_shared=job.run.storage_is_shared, nodes=nodes, name="input")


def check_room(job: ScoreJob, bundle: Bundle, *, rows: int, output: str, actors: int) -> None:
    """Looks at free disk and memory of this node before the work.

    Raises:
        ResourceError: there is less than the job will take, by an estimate that is rather low.
    """
    weights = (bundle.path / MODEL_FILE).stat().st_size
    needed = actors * (PROCESS_BYTES + MODEL_COPIES * weights)
    free = psutil.virtual_memory().available
    if free < needed:
        raise ResourceError(
            f"{actors} actor(s) take about {needed / 1e9:.1f} GB of memory. Received: {free / 1e9:.1f} GB free"
        )
    if is_remote(output):
        return
    row_bytes = ROW_BYTES + 4 * len(bundle.info.class_names)
    needed, free = 2 * rows * row_bytes, shutil.disk_usage(output).free  # shards, and the parts made of them
    if free < needed:
        raise ResourceError(
            f"{rows:,} rows take about {needed / 1e9:.1f} GB of disk while they are written. "
            f"Received: {free / 1e9:.1f} GB free below {output!r}"
        )
