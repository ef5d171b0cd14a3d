"""Finds the batch that fits, by training for two steps in processes like those of the workers.

Owns: the processes, in a Ray task with the resources of a worker; the number that stands for `--batch-size auto`; what
a run that ran out of memory ends with. Does not own: which sizes (`training/batch_size.py`), or the steps
(`training/memory_use.py`).

Contract: a new process for each size, which the kernel kills before any other where memory is short. The measured
worker is alone, with random images: neither the data nor the others' addresses are needed.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial

import ray

from mnist_dist import processor
from mnist_dist.config import KerasBackend, PhasesConfig, TrainJob
from mnist_dist.data.records import RecordPlan
from mnist_dist.engines.steps import Report, call_in_process
from mnist_dist.errors import ConfigError, Interrupted, LockLost, MnistDistError, OutOfMemory, StepKilled, WorkersFailed
from mnist_dist.on_ray.cluster import Share
from mnist_dist.on_ray.data.prepare import Listed
from mnist_dist.on_ray.tasks import peak_memory_bytes, wait_for
from mnist_dist.on_ray.training.backend import resolve_backend, start_backend
from mnist_dist.session import Session
from mnist_dist.training.batch_size import (
    FIRST,
    SECOND,
    Usage,
    candidates,
    found_in_words,
    is_too_large,
    largest_fitting,
    layout_of,
    measured_phases,
    out_of_memory_in_words,
)
from mnist_dist.training.planning import sizes_of

log = logging.getLogger(__name__)

FURTHEST = 32  # times as large as the larger of two measured batches may be what is judged by them
USUAL_MEASUREMENT_S = 15.0  # to import Keras and to compile the step of a small network, for the progress bar


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What a process trains to measure its memory."""

    job: TrainJob
    phases: PhasesConfig
    records: RecordPlan
    backend: KerasBackend
    cpus: float
    workers: int
    gpu: bool
    images: int = 0
    """In a batch of the worker."""


def with_found_batch(job: TrainJob, listed: Listed, *, share: Share, session: Session) -> TrainJob:
    """The job with a number in place of `--batch-size auto`: the largest batch that fits.

    Args:
        job: any job; one with a number is returned as it is.
        listed: its images. How many of them are unreadable is not known yet.
        share: the workers.
        session: shows progress and the number.

    Raises:
        OutOfMemory: not even the smallest batch fits.
        ConfigError: see `train_briefly`, and the settings of the network.
        WorkersFailed: the measurement failed.
        Interrupted: SIGINT or SIGTERM.
    """
    if job.fit.batch_size != "auto":
        return job
    layout = layout_of(job, workers=share.workers, gpus=share.gpus)
    sizes = candidates(layout, train_images=sizes_of(listed.source.table["split"], job.data).train)
    phases = measured_phases(job)
    images, usage = sizes[-1], None
    if phases is not None:
        brief = _brief(job, phases, listed.plan, share=share, session=session)
        fitting = largest_fitting(sizes, lambda images: _usage(replace(brief, images=images), share, session))
        if not fitting:
            raise OutOfMemory(
                f"not even the smallest batch fits into the memory of a worker, {sizes[0]} images: use a smaller "
                "backbone or --image-size-px, or a larger machine"
            )
        usage = fitting[-1]
        images = usage.images
    batch_size = images * share.workers
    session.console.line(found_in_words(batch_size, usage))
    return replace(job, fit=replace(job.fit, batch_size=batch_size))


def explained(
    error: OutOfMemory | WorkersFailed, job: TrainJob, records: RecordPlan, *, share: Share, session: Session
) -> OutOfMemory | WorkersFailed:
    """The error with what would fit, as two small batches show it; if they cannot be measured, half is guessed.

    Args:
        error: that the workers ran out of memory; or that they died, which is taken as the same if they needed more
            than they had. TensorFlow on CPUs often ends its process so (2.21: a signal within oneDNN after it has
            logged RESOURCE_EXHAUSTED), and so does the kernel.
        job: what was trained.
        records: the plan of its images.
        share: the workers.
        session: of the job.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        LockLost: another driver took over the run.
    """
    images = -(-job.fit.global_batch // share.workers)
    points = _small_batches(job, records, images=images, share=share, session=session)
    if isinstance(error, WorkersFailed) and not is_too_large(images, points):
        return error
    words = out_of_memory_in_words(
        job.fit.global_batch,
        cause=str(error) if isinstance(error, OutOfMemory) else "a worker died",
        accumulate=job.optimizer.accumulate,
        layout=layout_of(job, workers=share.workers, gpus=share.gpus),
        points=points,
    )
    return OutOfMemory(words)


def _small_batches(job: TrainJob, records: RecordPlan, *, images: int, share: Share, session: Session) -> list[Usage]:
    """What up to two batches take that are much smaller than `images` per worker; empty: it cannot be measured."""
    layout, phases = layout_of(job, workers=share.workers, gpus=share.gpus), measured_phases(job)
    if phases is None:
        return []
    sizes = [size for size in candidates(layout, train_images=2**31) if size <= images // 2]
    larger = max(SECOND, images // FURTHEST)
    small = sorted({max((size for size in sizes if size <= most), default=0) for most in (FIRST, larger)} - {0})
    try:
        brief = _brief(job, phases, records, share=share, session=session)
        measured = [_usage(replace(brief, images=size), share, session) for size in small]
    except (Interrupted, LockLost):
        raise
    except MnistDistError:
        log.warning("the memory of small batches could not be measured", exc_info=True)
        return []
    return [usage for usage in measured if usage is not None]


def _brief(job: TrainJob, phases: PhasesConfig, records: RecordPlan, *, share: Share, session: Session) -> Brief:
    backend = resolve_backend(job.run.backend, gpus=share.gpus, session=session)
    return Brief(
        job=job,
        phases=phases,
        records=records,
        backend=backend,
        cpus=share.cpus,
        workers=share.workers,
        gpu=share.gpus > 0,
    )


def _usage(brief: Brief, share: Share, session: Session) -> Usage | None:
    """Measures one size in a Ray task; see `Measure`."""
    images = brief.images
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0, max_calls=1)(measure_here).remote(brief)
    try:
        (usage,) = wait_for([task], session, title=f"memory, {images} images", expected_s=USUAL_MEASUREMENT_S)
    except WorkersFailed as error:
        if isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
            return None
        raise
    log.info("memory of a batch of %d images per worker: %s", images, usage)
    return usage  # type: ignore[no-any-return]


def measure_here(brief: Brief) -> Usage | None:
    """Measures one size on this node, in a process of its own; see `Measure`.

    Raises:
        ConfigError: the network cannot be trained so.
        StepFailed: the process failed, and not for lack of memory.
    """
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    beside_each_other = min(brief.workers, int(node["Resources"].get("CPU", brief.cpus) // brief.cpus))
    expected = processor.free_memory_bytes() // max(1, beside_each_other)
    try:
        peak = call_in_process(partial(_peak, brief), title="memory of a batch")
    except StepKilled:
        log.info("%d images: the process was killed", brief.images, exc_info=True)
        return None
    if isinstance(peak, ConfigError):
        raise peak
    if peak is None:
        return None
    used, available = peak
    return Usage(images=brief.images, peak_bytes=used, available_bytes=available or expected)


def _peak(brief: Brief, _: Report) -> tuple[int, int | None] | ConfigError | None:
    """The peak of this process, and the memory of a GPU if that counts, bytes. None: there was not enough memory."""
    start_backend(brief.backend, keep_compiled=False)  # Before Keras is imported.
    from mnist_dist.engines.engine import hide_gpus, is_out_of_memory, use_cpus
    from mnist_dist.training.memory_use import train_briefly
    from mnist_dist.training.precision import resolve_precision

    if not brief.gpu:
        hide_gpus()
    use_cpus(int(brief.cpus))
    job, records = brief.job, brief.records
    try:
        gpu = train_briefly(
            job,
            brief.phases,
            images=brief.images,
            spec=records.spec,
            classes=len(records.class_names),
            precision=resolve_precision(job.fit.precision, backbone=job.model.backbone, gpu=brief.gpu),
        )
    except ConfigError as error:
        return error
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise
    return (peak_memory_bytes(), None) if gpu is None else (gpu.peak_bytes, gpu.total_bytes)
