"""The dry run of a search: the search itself in small, in scratch storage that is deleted.

Owns: what makes it small, and the judgement. Does not own: the search (`search.py`).
"""

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.config import DataConfig
from mnist_dist.console import Console
from mnist_dist.data.splits import Splits
from mnist_dist.errors import WorkersFailed
from mnist_dist.on_ray.data.prepare import DecodedData, scratch_storage, split
from mnist_dist.on_ray.search.search import TRIAL_RECORD, Search, check_search, facts_of
from mnist_dist.on_ray.training.train import DRY_RUN_IMAGES
from mnist_dist.search_config import SearchJob
from mnist_dist.session import locked_session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.runs import Run
from mnist_dist.tuning.space import describe, drawn_for, one_of_each
from mnist_dist.tuning.trials import TrialRecords
from mnist_dist.tuning.warm_start import read_warm_start


def dry_run(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Runs one step of one trial for each architecture and way to train it, and of one finalist; keeps nothing.

    Args:
        job: what would be searched.
        recipe: the recipe's name.
        console: shows progress to the user.

    Returns:
        `dry_run`, `trials` (how many were run), `failed` (0), `seconds`.

    Raises:
        ConfigError: the space, the data, the weights or the cluster is unsuitable.
        WorkersFailed: a trial failed, or the finalist; the message names each trial.
        Interrupted: a signal stopped the dry run.
    """
    began_at = time.time()
    check_search(job)
    if job.search.like is not None:
        read_warm_start(job)
    ANYWHERE.check_writable(job.run.storage)
    with scratch_storage(job.run.storage, is_shared=job.run.storage_is_shared, name="dry-run") as scratch:
        small, images = _in_small(job, scratch)
        run = Run(join(scratch, "dry-run"), begun_by=TRIAL_RECORD)
        with locked_session(console, lock_uri=run.lock_uri, what=run.uri) as session:
            search = Search(small, session, run=run, began_at=began_at, split=partial(_few, images=images))
            result = search.run_to_end(facts_of(small, recipe))
            _judge(run)
    console.line(f"Dry run: {result['trials']} trial(s), a finalist and the bundle work. Nothing was kept.")
    return {"dry_run": True, **{name: result[name] for name in ("trials", "failed", "seconds")}}


def _in_small(job: SearchJob, scratch: str) -> tuple[SearchJob, int]:
    """The search with a step in each epoch, and the number of images for that."""
    small = one_of_each(job, batch_of=min, epochs=1)
    images = max(drawn_for(small, each)["batch_size"][1].grid()[0] for each in small.backbones)
    training_fraction = 1 - job.data.validation_fraction - job.data.test_fraction
    most = max(DRY_RUN_IMAGES, math.ceil(2 * images / training_fraction))
    data = replace(job.data, limit=min(job.data.limit or most, most))
    run = replace(job.run, storage=scratch, name="dry-run", dry_run=False, tracker=())
    return replace(small, data=data, run=run), images


def _few(decoded: DecodedData, data: DataConfig, *, console: Console, images: int) -> Splits:
    """The splits with at most so many images each, from begin to end."""
    splits = split(decoded, data, console=console)
    return replace(
        splits, train=_spread(splits.train, images), val=_spread(splits.val, images), test=_spread(splits.test, images)
    )


def _spread(rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]


def _judge(run: Run) -> None:
    """Raises WorkersFailed if a trial failed."""
    trials = TrialRecords(join(run.uri, "trials")).read().values()
    failed = [f"{describe(trial.params)}: {trial.error}" for trial in trials if trial.status == "failed"]
    if failed:
        raise WorkersFailed(f"{len(failed)} of {len(trials)} trials of the dry run failed: {'; '.join(failed)}")
