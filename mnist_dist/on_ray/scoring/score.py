"""The scoring job, the driver's side: what there is to score, the shards that are not done, the commit.

Loads neither TensorFlow nor Keras. `shard_runner.py` runs the shards, `actor.py` is what the workers do,
`scoring/commit.py` owns what lies in the output.

In what order a job resumes: a commit that was begun is replayed; else an unfinished generation is finished, without
listing anything (`commit.resume`); else a finished table is returned, or a new generation is begun.
"""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import filesize

import mnist_dist
from mnist_dist.config import EngineConfig, ScoreJob, differences, require
from mnist_dist.console import Console
from mnist_dist.engines.choice import EngineChoice
from mnist_dist.engines.conversion import versions_of
from mnist_dist.engines.formats import FORMATS
from mnist_dist.errors import DataError, ResumeConflict, TooManyBadImages
from mnist_dist.models.bundle import Bundle, load_bundle
from mnist_dist.on_ray.actors import Actors, await_actors, choose_actors
from mnist_dist.on_ray.cluster import Resources, connected
from mnist_dist.on_ray.scoring.actor import TASK_SHARD_BYTES, DecodingWorker, ScoreTask, ScoringWorker
from mnist_dist.on_ray.scoring.checks import check_found, check_output_is_outside, check_room
from mnist_dist.on_ray.scoring.engine import check_job_storage, job_engine
from mnist_dist.on_ray.scoring.stages import means_of, slowest_stage
from mnist_dist.scoring.commit import commit, rejudge, resume
from mnist_dist.scoring.decoding import Times
from mnist_dist.scoring.generations import Committed, Description, Generation, Origin, Output, Plan, Summary
from mnist_dist.scoring.inputs import Listing, list_inputs
from mnist_dist.scoring.manifest import (
    MAX_SHARD,
    MIN_SHARD,
    Manifest,
    carried_schema,
    choose_shard_size,
    write_manifest,
)
from mnist_dist.scoring.planning import Means
from mnist_dist.scoring.predictions import NOT_BAD, prediction_schema
from mnist_dist.scoring.scorer import SHARDS_AT_ONCE
from mnist_dist.scoring.selection import Selection, select_images
from mnist_dist.session import Session, locked_session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join

if TYPE_CHECKING:
    from mnist_dist.on_ray.shard_runner import ShardReport

WITH_RAY_DATA = "mnist_dist.on_ray.shard_runner"  # loaded while Ray starts
KERAS_BACKEND = "KERAS_BACKEND"  # variable of Keras
ENGINES_FOLDER = "_engines"  # in an output, where the bundle's place cannot be written
LIST_BEFORE_RAY_S = 1.0  # a listing that takes longer goes on while Ray starts
SHOWN_SUFFIXES = 5


def score(job: ScoreJob, *, console: Console) -> dict[str, Any]:
    """Scores images into a prediction table, or goes on with it, or returns what is finished.

    Args:
        job: what to score.
        console: what a person sees.

    Returns:
        The keys of the contract: `output`, `images` (rows of the table), `ok`, `errors` (rows that are neither ok nor
        unsupported), `skipped` (rows that earlier runs had scored), `images_per_s`, `seconds`, and more.

    Raises:
        ConfigError: a flag, the input, the bundle or the output does not fit; found before any scoring.
        TooManyBadImages: more rows are bad than `max_bad_fraction`; the table is there.
        ServiceError: the storage failed, not an image; what was scored is kept.
        WorkersFailed: workers died over the same shard more often than `max_failures`.
        Interrupted: a signal; what was scored is kept.
    """
    began_at = time.time()
    require(not job.run.plan, "a plan is made by plan_score", plan=True)
    check_job_storage(job, nodes=1)
    check_output_is_outside(job)
    bundle = load_bundle(job.bundle)
    output = Output(absolute(job.output))
    if job.run.dry_run:
        return _dry_run(job, output, console=console)
    ANYWHERE.check_writable(job.output)
    with locked_session(console, lock_uri=output.lock_uri, what=output.uri, wait_s=job.run.lock_wait_s) as session:
        return Scoring(job, bundle, output=output, session=session, began_at=began_at).run_to_end()


def _dry_run(job: ScoreJob, output: Output, *, console: Console) -> dict[str, Any]:
    """Says what would be done; writes nothing."""
    began = time.monotonic()
    listing = list_inputs(job.inputs)
    prediction_schema(job.table, carried=carried_schema(listing.table))
    _say_what_was_found(listing, console)
    committed = output.committed()
    if committed is not None:
        console.line(f"{output.uri} holds {committed.mark.rows:,} rows of the model {committed.mark.model_id[:12]}")
    console.line("dry run: nothing was written")
    return {
        "output": output.uri,
        "images": len(listing.table),
        "ok": 0,
        "errors": 0,
        "skipped": 0,
        "images_per_s": None,
        "seconds": round(time.monotonic() - began, 2),
        "dry_run": True,
    }


def _say_what_was_found(listing: Listing, console: Console) -> None:
    by_count = sorted(listing.by_suffix.items(), key=lambda item: -item[1])
    suffixes = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in by_count[:SHOWN_SUFFIXES])
    console.line(f"found {len(listing.table):,} images, {filesize.decimal(listing.total_bytes)} ({suffixes})")
    notes = {
        "in {:,} archives": listing.archives,
        "{:,} named twice, scored once": listing.named_twice,
        "{:,} archive members replaced by later ones of the same name": listing.duplicate_members,
        "{:,} other files left out": listing.others,
    }
    said = [text.format(count) for text, count in notes.items() if count]
    if said:
        console.line(f"  {'; '.join(said)}")


class Scoring:
    """One driver's work on an output."""

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
        self.found = 0  # images, by a listing under way
        self.discarded = 0  # number of a generation of another job that was thrown away
        self.scored, self.scoring_s = 0, 0.0  # images, and how long that took
        self.steady_images_per_s: float | None = None
        self.reports: list[ShardReport[Times]] = []

    def run_to_end(self) -> dict[str, Any]:
        """Does what is left to do, and gives the result."""
        resumed = resume(self.output, is_mine=self._is_mine, complete=self._complete, check=self.session.confirm_lock)
        self.discarded = resumed.discarded
        if resumed.committed is not None and self.job.mode != "incremental":
            return self._result(self._judged(resumed.committed))
        before = self.output.committed()
        if before is not None and self.job.mode != "fresh":
            self._check_same(self._summary(before), but=("inputs",) if self.job.mode == "incremental" else ())
        if before is not None and self.job.mode == "continue" and not self.job.retry_failed:
            return self._finished_before(before)
        return self._result(self._run_new(before))

    # --- what there is to do -----------------------------------------------------------------------------------------

    def _summary(self, before: Committed) -> Summary:
        if before.summary is None:
            raise DataError(
                f"_summary.json, which says what made the table, is gone or damaged; --mode fresh makes another. "
                f"Received: {self.output.uri!r}"
            )
        return before.summary

    def _check_same(self, theirs: Origin, *, but: tuple[str, ...] = ()) -> None:
        """Raises ResumeConflict where the job is not the one that made what is there."""
        lines = self._differences(theirs, but=but)
        if lines:
            shown = "\n  ".join(lines)
            raise ResumeConflict(
                f"{self.output.uri} was made by another job (take another --output, --mode incremental for other "
                f"input, or --mode fresh for everything anew):\n  {shown}"
            )

    def _differences(self, theirs: Origin, *, but: tuple[str, ...] = ()) -> list[str]:
        ours = {"model_id": self.bundle.info.model_id, **self.job.settings()}
        known = {"model_id": theirs.model_id, **ScoreJob.completed(theirs.settings)}
        for name, value in asdict(self.job.engine).items():
            if value != "auto":
                ours[name], known[name] = value, getattr(theirs, name)
        if theirs.engine == "keras":
            ours[KERAS_BACKEND], known[KERAS_BACKEND] = _keras_backend(), theirs.keras_backend
        wanted = [name for name in ours if name not in but]
        return differences({name: ours[name] for name in wanted}, {name: known.get(name) for name in wanted})

    def _is_mine(self, unfinished: Generation) -> bool:
        """Whether this job resumes a generation.

        Raises:
            ResumeConflict: it is another job's, which only mode fresh throws away.
        """
        fresh, is_committing = self.job.mode == "fresh", unfinished.is_committing
        is_mine = not self._differences(unfinished.plan) and (unfinished.plan.mode == "fresh" or not fresh)
        if is_committing:
            self.session.console.line(f"finishing the commit of {self.output.uri}")
        elif not is_mine and not fresh:
            self._check_same(unfinished.plan)
        return is_mine

    def _complete(self, unfinished: Generation) -> Committed:
        """Scores what is left of a generation, and commits it."""
        with Manifest(unfinished.manifest_uri) as manifest:
            shards = manifest.shards
        if len(unfinished.done_shards()) < shards:
            with connected(verbose=self.job.run.verbose, stop=self.session.stop, meanwhile=WITH_RAY_DATA) as have:
                have = await_actors(have, self.job.run, self.session)
                actors = choose_actors(have, self.job.run)
                engine = self.choose_engine(_engine_of(unfinished.plan), actors, have)
                self._score(unfinished, engine, actors, have)
        return self._commit(unfinished)

    def _finished_before(self, before: Committed) -> dict[str, Any]:
        self.session.console.line(
            f"{self.output.uri} is finished; --mode incremental scores what is new, --mode fresh all"
        )
        return self._result(self._judged(before))

    def _judged(self, before: Committed) -> Committed:
        """A table of an earlier run, by the share of bad rows that is allowed now."""
        ok = self._judge(self._summary(before).statuses, before.mark.rows)
        if ok != before.mark.failed:
            return before
        self.session.confirm_lock()
        return rejudge(self.output, before, ok=ok)

    def _run_new(self, before: Committed | None) -> Committed:
        """Lists, scores and commits a new generation; Ray starts meanwhile where listing takes long."""
        listing = SideThread(
            lambda: select_images(self.job, self.output, before=before, progress=self.note_found), name="listing"
        )
        listing.start()
        listing.join(LIST_BEFORE_RAY_S)
        rows = None if listing.is_alive() else len(listing.result().table)
        if rows == 0:
            return self._nothing_new(before)
        with connected(verbose=self.job.run.verbose, stop=self.session.stop, meanwhile=WITH_RAY_DATA) as have:
            have = await_actors(have, self.job.run, self.session)
            actors = choose_actors(have, self.job.run, most=rows and -(-rows // (self.job.shard_size or MIN_SHARD)))
            engine = self.choose_engine(self._asked(before), actors, have, images=rows)
            self.wait_for(listing)
            if not len(listing.result().table):
                return self._nothing_new(before)
            self.session.confirm_lock()
            generation = self.output.reserve(self._plan(before, engine), above=self.discarded)
            self._begin(generation, listing.result(), before, actors=actors, have=have)
            self._score(generation, engine, actors, have)
        return self._commit(generation)

    def score_sample(
        self, rows: pa.Table, engine: EngineChoice, actors: Actors, have: Resources, *, shard_size: int
    ) -> Summary:
        """Scores and commits some rows, as a new table; for a plan.

        Args:
            rows: `manifest.COLUMNS`, then the carried columns.
            engine: for the model.
            actors: what is taken.
            have: what the cluster has.
            shard_size: rows of a shard.
        """
        generation = self.output.reserve(self._plan(None, engine))
        check_found(self.job, rows, self.output, keep_old=False, nodes=have.nodes)
        generation.begin(lambda uri: write_manifest(uri, rows, shard_size=shard_size))
        self._score(generation, engine, actors, have)
        return self._summary(self._commit(generation))

    def note_found(self, images: int) -> None:
        """So many images were found so far."""
        self.found = images

    def wait_for(self, listing: SideThread) -> None:
        """Waits for a listing, and shows how far it is."""
        with self.session.console.progress("listing") as bar:
            self.session.watch(
                listing.ended, show=lambda: bar.update(done=0, total=1, note=f"{self.found:,} images so far")
            )

    def _nothing_new(self, before: Committed | None) -> Committed:
        assert before is not None, "without a table, a listing that finds nothing raises"
        self.session.console.line(f"{self.output.uri}: there is nothing to score")
        return self._judged(before)

    def _asked(self, before: Committed | None) -> EngineConfig:
        """The engine for a new generation: that of the rows which stay, if there are some."""
        if before is None or self.job.mode == "fresh":
            return self.job.engine
        noted = _engine_of(self._summary(before))
        if noted.engine == "keras" and self.job.engine.engine == "auto":
            self.session.console.line("the table keeps its engine, keras; --mode fresh chooses again")
        return noted

    def choose_engine(
        self, asked: EngineConfig, actors: Actors, have: Resources, *, images: int | None = None
    ) -> EngineChoice:
        """The engine for what is asked, converted where that is worth it; None: the images are still being listed."""
        check_job_storage(self.job, nodes=have.nodes)
        if actors.gpus and asked.engine != self.job.engine.engine and asked.engine != "keras":
            raise ResumeConflict(
                f"the rows that are there were made by {asked.engine}, which runs on CPUs: --gpus-per-actor 0 goes on, "
                f"--mode fresh makes the table anew. Received: {self.output.uri!r}"
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

    def _plan(self, before: Committed | None, engine: EngineChoice) -> Plan:
        return Plan(
            model_id=self.bundle.info.model_id,
            settings=self.job.settings(),
            engine=engine.engine,
            precision=engine.precision,
            engine_check=engine.check,
            keras_backend=_keras_backend(),
            mode=self.job.mode,
            keep_old=before is not None and self.job.mode != "fresh",
            began_at=datetime.fromtimestamp(self.began_at, UTC).isoformat(timespec="seconds"),
        )

    def _begin(
        self, generation: Generation, work: Selection, before: Committed | None, *, actors: Actors, have: Resources
    ) -> None:
        """Checks what can be checked with the list at hand, and writes down what is to be done."""
        if work.listing is not None:
            _say_what_was_found(work.listing, self.session.console)
        if before is not None and generation.plan.keep_old:
            self.session.console.line(
                f"{len(work.table):,} images are scored now; the table holds {before.mark.rows:,} rows"
            )
        check_found(self.job, work.table, self.output, keep_old=generation.plan.keep_old, nodes=have.nodes)
        check_room(
            self.job,
            self.bundle,
            rows=len(work.table),
            output=self.output.uri,
            actors=-(-actors.count // have.nodes),
        )
        size = self.job.shard_size or choose_shard_size(
            len(work.table),
            total_bytes=pc.sum(work.table["size_bytes"]).as_py() or 0,
            most=TASK_SHARD_BYTES // self.bundle.info.spec.image_bytes if actors.decode_in_tasks else MAX_SHARD,
        )
        generation.begin(lambda uri: write_manifest(uri, work.table, shard_size=size))

    # --- scoring -----------------------------------------------------------------------------------------------------

    def _task(self, generation: Generation, engine: EngineChoice, actors: Actors) -> ScoreTask:
        return ScoreTask(
            bundle=absolute(self.job.bundle),
            model_id=self.bundle.info.model_id,
            engine=engine,
            generation=generation,
            spec=self.bundle.info.spec,
            table=self.job.table,
            decoding=self.job.decoding,
            batch_size=self.job.run.batch_size,
            cpus=max(1, int(actors.cpus)),
        )

    def _score(self, generation: Generation, engine: EngineChoice, actors: Actors, have: Resources) -> None:
        """Scores the shards that are not done."""
        from mnist_dist.on_ray.shard_runner import ShardWork, run_shards  # only here: it loads Ray Data

        done = generation.done_shards()
        with Manifest(generation.manifest_uri) as manifest:
            rows, left = manifest.rows, [shard for shard in range(manifest.shards) if shard not in done]
            rows_done = sum(manifest.shard_rows(shard) for shard in done)
        if not left:  # what the workers of an earlier driver still put
            return
        self.session.console.line(
            f"scoring {rows - rows_done:,} images in {len(left):,} shards"
            f"{f' ({rows_done:,} were done before)' if done else ''}: {self.bundle.info.backbone} by {engine}, "
            f"{actors}, of {have}"
        )
        task = self._task(generation, engine, actors)
        work = ShardWork(
            worker=ScoringWorker(task),
            done=generation.done_shards,
            folder=generation.uri,
            max_deaths=self.job.run.max_failures,
            actors=actors,
            shards_at_once=SHARDS_AT_ONCE,
            before=DecodingWorker(task) if actors.decode_in_tasks else None,
            before_bytes=2 * TASK_SHARD_BYTES,  # the pixels, and their block
        )
        ran = run_shards(work, left, self.session, title="scoring", done=rows_done, total=rows)
        self.steady_images_per_s = ran.steady_images_per_s
        self.reports = ran.reports
        self._note_how_it_went(ran.reports, means_of(actors, have), images=rows - rows_done)

    def _note_how_it_went(self, reports: "list[ShardReport[Times]]", means: Means, *, images: int) -> None:
        if not reports:
            return
        # from the first shard's begin to the last one's end
        seconds = max(report.ended_at for report in reports) - min(report.began_at for report in reports)
        self.scored, self.scoring_s = self.scored + images, self.scoring_s + seconds
        steady = self.steady_images_per_s
        self.session.console.line(
            f"{images:,} images in {seconds:.1f} s, {images / seconds:,.1f} images/s"
            f"{f' ({steady:,.1f} once under way)' if steady else ''}; slowest stage: "
            f"{slowest_stage(reports, means, seconds=seconds)}"
        )

    # --- the table ---------------------------------------------------------------------------------------------------

    def _commit(self, generation: Generation) -> Committed:
        with Manifest(generation.manifest_uri) as manifest:
            shards, carried = manifest.shards, manifest.carried
        with self.session.console.progress("committing") as bar:
            return commit(
                self.output,
                generation,
                shards=shards,
                schema=prediction_schema(self.job.table, carried=carried),
                judge=self._judge,
                description=self._description(generation.plan),
                images_per_s=self._images_per_s(),
                check=lambda: self._check(generation),
                progress=lambda done, total: bar.update(done=done, total=total, note=f"{done:,} of {total:,} shards"),
            )

    def _description(self, plan: Plan) -> Description:
        packages = ("keras",) if plan.engine == "keras" else FORMATS[plan.engine].packages
        return Description(
            bundle=absolute(self.job.bundle),
            class_names=self.bundle.info.class_names,
            resize=self.bundle.info.spec.resize,
            versions={
                "python": platform.python_version(),
                "mnist_dist": mnist_dist.__version__,
                **versions_of(("pyarrow", *packages)),
            },
        )

    def _check(self, generation: Generation) -> None:
        if not generation.is_committing:  # from then on there is no table until the commit is through
            self.session.stop.check()
        self.session.confirm_lock()

    def _judge(self, statuses: Mapping[str, int], rows: int) -> bool:
        """Whether a table is good enough."""
        return _bad(statuses) / max(rows, 1) <= self.job.run.max_bad_fraction  # 0.29 * 100 is less than 29

    def _images_per_s(self) -> float | None:
        return round(self.scored / self.scoring_s, 2) if self.scoring_s else None

    def _result(self, committed: Committed) -> dict[str, Any]:
        """The JSON line's keys, once they were shown to a person.

        Raises:
            TooManyBadImages: the table was judged bad.
        """
        summary = self._summary(committed)
        mark, statuses = committed.mark, summary.statuses
        result = {
            "output": self.output.uri,
            "images": mark.rows,
            "ok": statuses.get("ok", 0),
            "errors": _bad(statuses),
            "skipped": mark.rows - self.scored,
            "images_per_s": self._images_per_s(),
            "steady_images_per_s": self.steady_images_per_s and round(self.steady_images_per_s, 2),
            "seconds": round(time.time() - self.began_at, 2),
            "statuses": statuses,
            "generation": mark.generation,
            "model_id": mark.model_id,
        }
        counts = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if count)
        self.session.console.line(f"{mark.rows:,} rows: {counts}")
        for status, examples in summary.examples.items():
            for example in examples:
                self.session.console.line(f"  {status}: {example.uri}: {example.error}")
        if mark.failed:
            raise TooManyBadImages(
                f"{_bad(statuses):,} of {mark.rows:,} rows are neither ok nor unsupported; --max-bad-fraction "
                f"allows {self.job.run.max_bad_fraction:.2%}. The table is complete, marked _FAILED: {self.output.uri}",
                result,
            )
        return result


def _keras_backend() -> str:
    """What Keras runs on in this job."""
    return os.environ.get(KERAS_BACKEND) or "tensorflow"


def _engine_of(origin: Origin) -> EngineConfig:
    """The engine that made rows."""
    return EngineConfig(engine=origin.engine, precision=origin.precision)


def _bad(statuses: Mapping[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status not in NOT_BAD)
