"""The driver of a scoring job: it lists the images, has the unfinished shards scored, and commits the table.

Owns: the order of these steps. Does not own: running the shards (`on_ray/shard_runner.py`), what a worker does
(`actor.py`), or the files in the output (`scoring/generations.py`, `scoring/commit.py`). Loads neither TensorFlow nor
Keras.

How a job resumes: a commit that has begun is replayed. Otherwise an unfinished generation is finished without listing
the input again (`commit.resume`). Otherwise a finished table is returned, or a new generation begins.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import filesize

import mnist_dist
from mnist_dist.config import differences, require
from mnist_dist.console import Console
from mnist_dist.data.decoding import Times
from mnist_dist.engines.choice import EngineChoice, own_engine, packages_of
from mnist_dist.engines.conversion import versions_of
from mnist_dist.engines.views import views_of
from mnist_dist.environment import KERAS_BACKEND, KERAS_BACKENDS
from mnist_dist.errors import DataError, ResumeConflict, TooManyBadImages
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, check_has_classes, load_bundle
from mnist_dist.on_ray.actors import Actors, await_actors, choose_actors
from mnist_dist.on_ray.cluster import Resources, check_environment, connected
from mnist_dist.on_ray.scoring.actor import TASK_SHARD_BYTES, DecodingWorker, ScoreTask, ScoringWorker
from mnist_dist.on_ray.scoring.checks import check_found, check_room
from mnist_dist.on_ray.scoring.engine import check_job_storage, job_engine
from mnist_dist.on_ray.scoring.stages import means_of, slowest_stage
from mnist_dist.score_config import EngineConfig, ScoreJob
from mnist_dist.scoring.commit import commit, rejudge, resume
from mnist_dist.scoring.delta import DeltaLog, check_output, delta_schema
from mnist_dist.scoring.generations import (
    ENGINES_FOLDER,
    Committed,
    Description,
    Generation,
    Origin,
    Output,
    Plan,
    Summary,
)
from mnist_dist.scoring.manifest import (
    MAX_SHARD,
    MIN_SHARD,
    Manifest,
    carried_schema,
    choose_shard_size,
    write_manifest,
)
from mnist_dist.scoring.planning import Means
from mnist_dist.scoring.predictions import NOT_BAD, Mark, count_bad, prediction_schema
from mnist_dist.scoring.scorer import SHARDS_AT_ONCE
from mnist_dist.scoring.selection import Selection, select_images
from mnist_dist.scoring.thresholds import with_thresholds
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.side_thread import SideThread
from mnist_dist.sources.listing import Listing, list_inputs
from mnist_dist.sources.places import check_outside
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.uris import absolute, join

if TYPE_CHECKING:
    from mnist_dist.on_ray.shard_runner import ShardReport

WITH_RAY_DATA = "mnist_dist.on_ray.shard_runner"  # imported while Ray starts
LIST_BEFORE_RAY_S = 1.0  # If listing takes longer than this, Ray starts in the meantime.
SHOWN_DIFFERENCES = 20  # of the settings; the thresholds of classes may be many
SHOWN_SUFFIXES = 5  # file suffixes shown with their counts on the console


def score(job: ScoreJob, *, console: Console) -> dict[str, Any]:
    """Scores images into a prediction table; resumes an unfinished table, and returns a finished one at once.

    Args:
        job: what to score, with which model, into which table.
        console: where progress and results are shown.

    Returns:
        The JSON line: `output`, `images` (rows of the table), `ok`, `errors` (bad rows: they claim to be
        images and have no prediction), `skipped` (rows scored by earlier runs), `images_per_s`, `seconds`, and more.

    Raises:
        ConfigError: a flag, the input, the bundle or the output is invalid; raised before any scoring.
        TooManyBadImages: no row is ok, or the share of bad rows exceeds `max_bad_fraction`; the table is complete.
        ServiceError: the storage failed, not a single image; finished shards are kept.
        WorkersFailed: workers died on the same shard more than `max_failures` times.
        Interrupted: a signal arrived; finished shards are kept.
    """
    began_at = started_at(console)
    require(not job.run.plan, "a plan is made by plan_score", plan=True)
    job, bundle = checked(job)
    output = Output(absolute(job.output))
    if job.run.dry_run:
        return _dry_run(job, bundle, output, console=console)
    if job.table.table_format == "delta":
        check_output(output.uri, output.store)
    ANYWHERE.check_writable(job.output)
    scoring, result = None, None
    while result is None:  # Each version of the table takes a lock of its own, which numbers it.
        with locked_session(
            console, lock_uri=output.lock_uri, what=output.uri, wait_s=job.run.lock_wait_s, above=output.max_number
        ) as session:
            scoring = scoring or Scoring(job, bundle, output=output, session=session, began_at=began_at)
            scoring.session = session
            result = scoring.run_to_end()
    return result


def checked(job: ScoreJob) -> tuple[ScoreJob, Bundle]:
    """Checks a job before anything is listed or locked; gives it with its thresholds, and its opened bundle.

    Raises:
        ConfigError: a place, the bundle, the thresholds or the environment cannot be used.
    """
    check_access((job.bundle, job.output))
    check_access(job.inputs.input, store=store_for(job.store))
    check_job_storage(job, nodes=1)
    check_outside(job.output, job.inputs.input, name="output")
    bundle = load_bundle(job.bundle)
    check_has_classes(bundle.info)
    check_environment(backends=() if bundle.is_onnx else KERAS_BACKENDS)
    return with_thresholds(job, bundle.info), bundle


def _schema(job: ScoreJob, bundle: Bundle, *, carried: pa.Schema) -> pa.Schema:
    """The columns of the job's table, as the shards have them."""
    num_features = bundle.num_features if job.table.embeddings else 0
    names = bundle.info.class_names
    schema = prediction_schema(job.table, carried=carried, class_names=names, num_features=num_features)
    if job.table.table_format == "delta":
        delta_schema(schema)  # raises for what Delta does not have, before any work
    return schema


def _spec(job: ScoreJob, bundle: Bundle) -> ImageSpec:
    """How the job decodes images: as the bundle says, in the quality that was asked for."""
    asked = job.decoding.decode_quality
    return bundle.info.spec if asked == "auto" else replace(bundle.info.spec, quality=asked)


def _fast_agreement(bundle: Bundle) -> str | None:
    """What is known of fast decoding for an imported model; None for one that was trained with it."""
    imported = bundle.info.imported
    if imported is None and bundle.info.spec.quality == "fast":
        return None
    if imported is None or imported.fast_agreement is None:
        return "fast decoding: how often the top class stays the same was not measured for this bundle"
    return f"fast decoding: same top class for {imported.fast_agreement:.2%} of {imported.fast_images:,} images"


def _check_format(job: ScoreJob, output: Output, before: Committed) -> None:
    """Raises ConfigError if the output holds a table of another format."""
    require(
        before.mark.table_format == job.table.table_format,
        f"{output.uri} holds a table of another format; choose another --output",
        table_format=job.table.table_format,
    )


def _dry_run(job: ScoreJob, bundle: Bundle, output: Output, *, console: Console) -> dict[str, Any]:
    """Lists the input and reports what would be scored; writes nothing."""
    began_at = started_at(console)
    listing = list_inputs(job.inputs, store=store_for(job.store))
    _schema(job, bundle, carried=carried_schema(listing.table))
    _show_listing(listing, console)
    committed = output.committed()
    if committed is not None:
        _check_format(job, output, committed)
        console.line(f"{output.uri} already holds {committed.mark.rows:,} rows by model {committed.mark.model_id[:12]}")
    console.line("dry run: nothing was written")
    return {
        "output": output.uri,
        "images": len(listing.table),
        "ok": 0,
        "errors": 0,
        "skipped": 0,
        "images_per_s": None,
        "seconds": seconds_since(began_at),
        "dry_run": True,
    }


def _show_listing(listing: Listing, console: Console) -> None:
    by_count = sorted(listing.by_suffix.items(), key=lambda item: -item[1])
    suffixes = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in by_count[:SHOWN_SUFFIXES])
    console.line(f"found {len(listing.table):,} images, {filesize.decimal(listing.total_bytes)} ({suffixes})")
    notes = listing.notes()
    if notes:
        console.line(f"  {'; '.join(notes)}")


class Scoring:
    """Scores one job into one output; the caller holds the lock of the output."""

    def __init__(
        self,
        job: ScoreJob,
        bundle: Bundle,
        *,
        output: Output,
        session: Session,
        began_at: float,
    ) -> None:
        self.job, self.bundle, self.output = job, bundle, output
        self.session, self.began_at = session, began_at
        self.spec = _spec(job, bundle)
        self.found = 0  # images listed so far
        self.scored, self.scoring_s = 0, 0.0  # images scored by this run, and the time it took
        self.steady_images_per_s: float | None = None
        self.reports: list[ShardReport[Times]] = []

    def run_to_end(self) -> dict[str, Any] | None:
        """Does what is left to do, and returns the result; None: only an earlier run was finished, and the increment
        needs another lock."""
        before = self.output.committed()
        if before is not None:
            _check_format(self.job, self.output, before)
        resumed = resume(
            self.output,
            fence=self.session.fence.number,
            is_mine=self._is_mine,
            complete=self._complete,
            check=self.session.confirm_lock,
        )
        if resumed is not None:
            return self._result(self._judged(resumed)) if self.job.mode != "incremental" else None
        before = self.output.committed()
        if before is not None and self.job.mode != "fresh":
            but = ("inputs",) if self.job.mode == "incremental" else ("decoding",) if self.job.retry_failed else ()
            self._check_same(self._summary(before), but=but)
        if before is not None and self.job.mode == "continue" and not self.job.retry_failed:
            return self._finished_before(before)
        return self._result(self._run_new(before))

    # --- deciding what to do -----------------------------------------------------------------------------------------

    def _summary(self, before: Committed) -> Summary:
        if before.summary is None:
            raise DataError(
                f"summary.json, which says how the table was made, is gone or damaged; --mode fresh makes another. "
                f"Received: {self.output.uri!r}"
            )
        return before.summary

    def _check_same(self, origin: Origin, *, but: tuple[str, ...] = ()) -> None:
        """Raises ResumeConflict unless this job would make the same rows as `origin`."""
        lines = self._differences(origin, but=but)
        if lines:
            more = [f"and {len(lines) - SHOWN_DIFFERENCES:,} more"] if len(lines) > SHOWN_DIFFERENCES else []
            shown = "\n  ".join([*lines[:SHOWN_DIFFERENCES], *more])
            raise ResumeConflict(
                f"{self.output.uri} was made by a job with other settings (use another --output, --mode incremental "
                f"for other input, or --mode fresh to score everything again):\n  {shown}"
            )

    def _differences(self, origin: Origin, *, but: tuple[str, ...] = ()) -> list[str]:
        own = {"model_id": self.bundle.info.model_id, **self.job.settings()}
        known = {"model_id": origin.model_id, **ScoreJob.completed(origin.settings)}
        for name in ("engine", "precision"):
            value = getattr(self.job.engine, name)
            if value != "auto":
                own[name], known[name] = value, getattr(origin, name)
        if origin.engine == "keras":
            own[KERAS_BACKEND], known[KERAS_BACKEND] = _keras_backend(), origin.keras_backend
        if isinstance(origin, Summary):  # older versions always decoded as the bundle says
            own["spec"], known["spec"] = asdict(self.spec), asdict(origin.described.spec or self.bundle.info.spec)
        compared = [name for name in own if name not in but]
        return differences({name: own[name] for name in compared}, {name: known.get(name) for name in compared})

    def _is_mine(self, unfinished: Generation) -> bool:
        """Whether the unfinished generation belongs to this job, which then resumes it.

        Raises:
            ResumeConflict: it belongs to another job; only mode fresh deletes it.
        """
        fresh, is_committing = self.job.mode == "fresh", unfinished.is_committing
        drops = unfinished.plan.dropped and unfinished.plan.mode == "incremental"
        if drops and not (self.job.drop_missing or fresh or is_committing):
            raise ResumeConflict(
                f"{self.output.uri}: the unfinished run drops {unfinished.plan.dropped:,} rows of images that are "
                "gone; --mode incremental --drop-missing finishes it, --mode fresh scores everything again"
            )
        is_mine = not self._differences(unfinished.plan) and (unfinished.plan.mode == "fresh" or not fresh)
        if is_committing:
            self.session.console.line(f"finishing the commit of {self.output.uri}")
        elif not is_mine and not fresh:
            self._check_same(unfinished.plan)
        return is_mine

    def _complete(self, unfinished: Generation) -> Committed:
        """Scores the remaining shards of a generation, and commits it."""
        with Manifest(unfinished.manifest_uri, store=unfinished.store) as manifest:
            rows, shards = manifest.rows, manifest.shards
        if len(unfinished.done_shards()) < shards:
            with connected(verbose=self.job.run.verbose, stop=self.session.stop, meanwhile=WITH_RAY_DATA) as resources:
                resources = await_actors(resources, self.job.run, self.session)
                actors = choose_actors(resources, self.job.run)
                engine = self.choose_engine(self._engine_of(unfinished.plan), actors, resources, images=rows)
                self._score(unfinished, engine, actors, resources)
        return self._commit(unfinished)

    def _finished_before(self, before: Committed) -> dict[str, Any]:
        self.session.console.line(
            f"{self.output.uri} is finished; --mode incremental scores new images, --mode fresh scores all again"
        )
        return self._result(self._judged(before))

    def _judged(self, before: Committed) -> Committed:
        """Marks the table of an earlier run as good or failed, by what is allowed now."""
        ok = self._judge(self._summary(before).statuses, before.mark.rows)
        if ok != before.mark.failed:
            return before
        return rejudge(self.output, before, fence=self.session.fence.number, ok=ok, check=self.session.confirm_lock)

    def _run_new(self, before: Committed | None) -> Committed:
        """Lists, scores and commits a new generation; Ray starts in the meantime when listing takes long."""
        if before is None:
            self.output.check_nothing_else(self.job.table.table_format)
        listing = SideThread(
            lambda: select_images(self.job, self.output, before=before, progress=self.note_found), name="listing"
        )
        listing.start()
        listing.join(LIST_BEFORE_RAY_S)
        if not listing.is_alive() and not len(listing.result().table):
            return self._nothing_new(before, listing.result())
        with connected(verbose=self.job.run.verbose, stop=self.session.stop, meanwhile=WITH_RAY_DATA) as resources:
            resources = await_actors(resources, self.job.run, self.session)
            if listing.is_alive():
                choose_actors(resources, self.job.run)  # what does not fit is said before a long listing ends
            self.wait_for(listing)
            work = listing.result()
            rows = len(work.table)
            if not rows:
                return self._nothing_new(before, work)
            actors = choose_actors(resources, self.job.run, most=-(-rows // (self.job.shard_size or MIN_SHARD)))
            # after the listing: a model is not converted for a few images
            engine = self.choose_engine(self._requested_engine(before), actors, resources, images=rows)
            self.session.confirm_lock()
            plan = self._plan(before, engine, dropped=len(work.gone or ()))
            generation = self.output.new_generation(plan, fence=self.session.fence.number)
            self._begin(generation, work, before, actors=actors, resources=resources)
            self._score(generation, engine, actors, resources)
        return self._commit(generation)

    def score_sample(
        self, rows: pa.Table, engine: EngineChoice, actors: Actors, have: Resources, *, shard_size: int
    ) -> Summary:
        """Scores and commits a sample as a new table; used by `--plan`.

        Args:
            rows: `image_table.COLUMNS`, then the carried columns.
            engine: the engine that runs the model.
            actors: the actors to start.
            have: the resources of the cluster.
            shard_size: rows per shard.
        """
        generation = self.output.new_generation(self._plan(None, engine), fence=self.session.fence.number)
        schema = _schema(self.job, self.bundle, carried=carried_schema(rows))
        check_found(self.job, rows, self.output, schema=schema, keep_old=False, nodes=have.nodes)
        generation.begin(lambda uri: write_manifest(uri, rows, shard_size=shard_size, store=generation.store))
        self._score(generation, engine, actors, have)
        return self._summary(self._commit(generation))

    def note_found(self, images: int) -> None:
        """Takes the number of images listed so far, for the progress bar."""
        self.found = images

    def wait_for(self, listing: SideThread) -> None:
        """Waits for the listing, and shows its progress."""
        with self.session.console.progress("listing") as bar:
            self.session.watch(
                listing.ended, show=lambda: bar.update(done=0, total=1, note=f"{self.found:,} images so far")
            )

    def _nothing_new(self, before: Committed | None, work: Selection) -> Committed:
        assert before is not None, "without a table, an empty listing raises"
        self.session.console.line(f"{self.output.uri}: there is nothing to score")
        return self._judged(before) if work.is_empty else self._drop(before, work)

    def _drop(self, before: Committed, work: Selection) -> Committed:
        """Commits the old table without the rows whose images are gone."""
        assert work.gone is not None
        empty = work.table.slice(0, 0)
        schema = _schema(self.job, self.bundle, carried=carried_schema(empty))
        check_found(self.job, empty, self.output, schema=schema, keep_old=True, nodes=1)
        self.session.confirm_lock()
        made = self._summary(before)
        origin = {field.name: getattr(made, field.name) for field in fields(Origin)}
        own = {"settings": self.job.settings(), "mode": self.job.mode, "keep_old": True, "began_at": self._began_at}
        plan = Plan(**{**origin, **own}, dropped=len(work.gone))
        generation = self.output.new_generation(plan, fence=self.session.fence.number)
        self.session.console.line(f"{len(work.gone):,} rows of images that are gone are dropped")
        generation.begin(
            lambda uri: write_manifest(uri, empty, shard_size=1, store=generation.store), dropped=work.gone
        )
        return self._commit(generation)

    def _requested_engine(self, before: Committed | None) -> EngineConfig:
        """The engine to use for a new generation: that of the existing rows, if they are kept."""
        if before is None or self.job.mode == "fresh":
            return self.job.engine
        existing = self._engine_of(self._summary(before))
        if existing.engine == self._own_engine.engine and self.job.engine.engine == "auto":
            self.session.console.line(
                f"the table keeps its engine, {existing.engine}; --mode fresh chooses the engine again"
            )
        return existing

    def _engine_of(self, origin: Origin) -> EngineConfig:
        """The engine that made the rows."""
        return replace(self.job.engine, engine=origin.engine, precision=origin.precision)

    def choose_engine(self, asked: EngineConfig, actors: Actors, have: Resources, *, images: int) -> EngineChoice:
        """Chooses the engine, and converts the model if that saves time for so many images."""
        check_job_storage(self.job, nodes=have.nodes)
        if actors.gpus and asked.engine not in (self.job.engine.engine, self._own_engine.engine):
            raise ResumeConflict(
                f"the existing rows were made by {asked.engine}, which runs on CPUs: --gpus-per-actor 0 keeps it, "
                f"--mode fresh makes a new table. Received: {self.output.uri!r}"
            )
        return job_engine(
            self.job,
            self.bundle,
            asked,
            actors=actors,
            have=have,
            images=images,
            fallback=join(self.output.uri, ENGINES_FOLDER),
            session=self.session,
        )

    @property
    def _own_engine(self) -> EngineChoice:
        return own_engine(self.bundle)

    @property
    def _began_at(self) -> str:
        return datetime.fromtimestamp(self.began_at, UTC).isoformat(timespec="seconds")

    def _plan(self, before: Committed | None, engine: EngineChoice, *, dropped: int = 0) -> Plan:
        return Plan(
            model_id=self.bundle.info.model_id,
            settings=self.job.settings(),
            engine=engine.engine,
            precision=engine.precision,
            engine_check=engine.check,
            keras_backend=_keras_backend(),
            mode=self.job.mode,
            keep_old=before is not None and self.job.mode != "fresh",
            began_at=self._began_at,
            dropped=dropped,
        )

    def _begin(
        self, generation: Generation, work: Selection, before: Committed | None, *, actors: Actors, resources: Resources
    ) -> None:
        """Checks the listed images, chooses the shard size, and writes the manifest and the plan of the generation."""
        if work.listing is not None:
            _show_listing(work.listing, self.session.console)
        if before is not None and generation.plan.keep_old:
            self.session.console.line(
                f"{len(work.table):,} images to score; the table already holds {before.mark.rows:,} rows"
            )
        if work.gone:
            what = "archives that can be read now" if self.job.retry_failed else "images that are gone"
            self.session.console.line(f"{len(work.gone):,} rows of {what} are dropped")
        check_found(
            self.job,
            work.table,
            self.output,
            schema=_schema(self.job, self.bundle, carried=carried_schema(work.table)),
            keep_old=generation.plan.keep_old,
            nodes=resources.nodes,
        )
        check_room(
            self.job,
            self.bundle,
            rows=len(work.table),
            output=self.output.uri,
            actors=-(-actors.count // resources.nodes),
        )
        size = self.job.shard_size or choose_shard_size(
            len(work.table),
            total_bytes=pc.sum(work.table["size_bytes"]).as_py() or 0,
            most=TASK_SHARD_BYTES // self.spec.image_bytes if actors.decode_in_tasks else MAX_SHARD,
        )
        generation.begin(
            lambda uri: write_manifest(uri, work.table, shard_size=size, store=generation.store), dropped=work.gone
        )

    # --- scoring -----------------------------------------------------------------------------------------------------

    def _task(self, generation: Generation, engine: EngineChoice, actors: Actors, *, carried: pa.Schema) -> ScoreTask:
        return ScoreTask(
            bundle=absolute(self.job.bundle),
            model_id=self.bundle.info.model_id,
            engine=engine,
            generation=generation,
            spec=self.spec,
            table=self.job.table,
            schema=_schema(self.job, self.bundle, carried=carried),
            decoding=self.job.decoding,
            store=store_for(self.job.store),
            batch_size=self.job.run.batch_size,
            cpus=max(1, int(actors.cpus)),
            tta=self.job.engine.tta,
            gpu=actors.gpus > 0,
        )

    def _score(self, generation: Generation, engine: EngineChoice, actors: Actors, resources: Resources) -> None:
        """Scores the shards that are not done yet."""
        from mnist_dist.on_ray.shard_runner import ShardWork, run_shards  # imported here because it loads Ray Data

        done = generation.done_shards()
        with Manifest(generation.manifest_uri, store=generation.store) as manifest:
            rows, left = manifest.rows, [shard for shard in range(manifest.shards) if shard not in done]
            rows_done, carried = sum(manifest.shard_rows(shard) for shard in done), manifest.carried
        if not left:  # the workers of an earlier driver have finished the last shards in the meantime
            return
        self.session.console.line(
            f"scoring {rows - rows_done:,} images in {len(left):,} shards"
            f"{f' ({rows_done:,} already done)' if done else ''}: {self.bundle.info.backbone} by {engine}, "
            f"{actors}, on {resources}"
        )
        agreement = _fast_agreement(self.bundle) if self.job.decoding.decode_quality == "fast" else None
        if agreement:
            self.session.console.line(agreement)
        if self.job.engine.tta:
            views = len(views_of(self.job.engine.tta))
            self.session.console.line(f"test-time augmentation: {views} views of each image, {views} times the work")
        task = self._task(generation, engine, actors, carried=carried)
        work = ShardWork(
            worker=ScoringWorker(task),
            done=generation.done_shards,
            folder=generation.uri,
            max_deaths=self.job.run.max_failures,
            actors=actors,
            shards_at_once=SHARDS_AT_ONCE,
            before=DecodingWorker(task) if actors.decode_in_tasks else None,
            before_bytes=2 * TASK_SHARD_BYTES,  # twice: the pixels, and the Ray block that they are copied into
        )
        ran = run_shards(work, left, self.session, title="scoring", done=rows_done, total=rows)
        self.steady_images_per_s = ran.steady_images_per_s
        self.reports = ran.reports
        self._report_speed(ran.reports, means_of(actors, resources), images=rows - rows_done)

    def _report_speed(self, reports: "list[ShardReport[Times]]", means: Means, *, images: int) -> None:
        if not reports:
            return
        # from the start of the first shard to the end of the last one
        seconds = max(report.ended_at for report in reports) - min(report.began_at for report in reports)
        self.scored, self.scoring_s = self.scored + images, self.scoring_s + seconds
        steady = self.steady_images_per_s
        self.session.console.line(
            f"{images:,} images in {seconds:.1f} s, {images / seconds:,.1f} images/s"
            f"{f' ({steady:,.1f} at steady speed)' if steady else ''}; slowest stage: "
            f"{slowest_stage(reports, means, seconds=seconds)}"
        )

    # --- the table ---------------------------------------------------------------------------------------------------

    def _commit(self, generation: Generation) -> Committed:
        with Manifest(generation.manifest_uri, store=generation.store) as manifest:
            shards, carried = manifest.shards, manifest.carried
        with self.session.console.progress("committing") as bar:
            return commit(
                self.output,
                generation,
                fence=self.session.fence.number,
                shards=shards,
                schema=_schema(self.job, self.bundle, carried=carried),
                judge=self._judge,
                description=self._description(generation.plan),
                images_per_s=self._images_per_s(),
                check=lambda: self._check(generation),
                table_format=self.job.table.table_format,
                progress=lambda done, total: bar.update(done=done, total=total, note=f"{done:,} of {total:,} shards"),
                part_rows=self.job.max_rows_per_file,
            )

    def _description(self, plan: Plan) -> Description:
        made_by = replace(self._own_engine, engine=plan.engine, precision=plan.precision)
        return Description(
            bundle=absolute(self.job.bundle),
            class_names=self.bundle.info.class_names,
            resize=self.spec.resize,
            spec=self.spec,
            versions={
                "python": platform.python_version(),
                "mnist_dist": mnist_dist.__version__,
                **versions_of(("pyarrow", *packages_of(made_by))),
            },
            multi_label=self.job.table.is_multi_label,
            thresholds=self.job.table.thresholds,
            tta=self.job.engine.tta,
        )

    def _check(self, generation: Generation) -> None:
        if not generation.is_committing:  # a running commit is not stopped: until it ends there is no table
            self.session.stop.check()
        self.session.confirm_lock()

    def _judge(self, statuses: Mapping[str, int], rows: int) -> bool:
        """Whether a table is marked as good: some rows are ok, and few enough are bad. An empty table is good."""
        is_useful = statuses.get("ok", 0) > 0 or rows == 0
        return is_useful and count_bad(statuses) / max(rows, 1) <= self.job.run.max_bad_fraction  # 0.29 * 100 < 29

    def _images_per_s(self) -> float | None:
        return round(self.scored / self.scoring_s, 2) if self.scoring_s else None

    def _result(self, committed: Committed) -> dict[str, Any]:
        """Shows the result on the console, and returns the contents of the JSON line.

        Raises:
            TooManyBadImages: the table is marked as failed.
        """
        summary = self._summary(committed)
        mark, statuses = committed.mark, summary.statuses
        result = {
            "output": self.output.uri,
            "images": mark.rows,
            "ok": statuses.get("ok", 0),
            "errors": count_bad(statuses),
            "skipped": mark.rows - self.scored,
            "images_per_s": self._images_per_s(),
            "steady_images_per_s": self.steady_images_per_s and round(self.steady_images_per_s, 2),
            "seconds": seconds_since(self.began_at),
            "statuses": statuses,
            "generation": mark.number,
            "model_id": mark.model_id,
        }
        counts = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if count)
        self.session.console.line(f"{mark.rows:,} rows: {counts}")
        for status, examples in summary.examples.items():
            for example in examples:
                self.session.console.line(f"  {status}: {example.uri}: {example.error}")
        self._vacuum(mark)
        if mark.failed:
            raise TooManyBadImages(
                f"{self._why_failed(summary, counts)}. The table is complete, marked _FAILED: {self.output.uri}", result
            )
        return result

    def _why_failed(self, summary: Summary, counts: str) -> str:
        """Why a table is not good enough, with an example, of a bad row where there is one, and what to do."""
        ok, bad = summary.statuses.get("ok", 0), count_bad(summary.statuses)
        what = f"{bad:,} of {summary.rows:,} rows are bad" if ok else f"none of {summary.rows:,} rows is ok"
        example = ""
        for status, (row, *_) in sorted(summary.examples.items(), key=lambda item: item[0] in NOT_BAD)[:1]:
            example = f", such as {row.uri} ({status}{f': {row.error}' if row.error else ''})"
        allowed = f"; --max-bad-fraction allows {self.job.run.max_bad_fraction:.2%}" if ok else ""
        limits = ", or raise the limits that they name," if "too_large" in summary.statuses else ""
        remedy = f"repair or install what their errors name{limits} and --retry-failed scores the bad rows again"
        return f"{what} ({counts}){example}{allowed}; {remedy if bad else 'none claims to be an image'}"

    def _vacuum(self, mark: Mark) -> None:
        """Deletes replaced files of a Delta table, if that was asked for."""
        hours = self.job.run.vacuum_older_than
        if hours is None or mark.table_format != "delta":
            return
        self.session.confirm_lock()
        count = DeltaLog(join(self.output.uri, mark.folder), self.output.store).vacuum(mark.files, hours=hours)
        self.session.console.line(
            f"{count:,} replaced files older than {hours} h deleted"
            if count is not None
            else "no replaced files were deleted: another program has changed the Delta table since"
        )


def _keras_backend() -> str:
    """The Keras backend of this job."""
    return os.environ.get(KERAS_BACKEND) or "tensorflow"
