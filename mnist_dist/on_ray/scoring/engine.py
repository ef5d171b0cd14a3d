"""Shared by a scoring job and its plan: choosing the engine, and checking what all nodes must see."""

import ray

from mnist_dist.console import Console, Stop
from mnist_dist.engines.choice import EngineChoice, EngineRequest, prepare_engine
from mnist_dist.models.bundle import Bundle, load_bundle
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import Resources, check_storage
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.score_config import EngineConfig, ScoreJob
from mnist_dist.session import Session
from mnist_dist.store.uris import absolute, is_bucket

WORTH_CONVERTING = 2_000  # images; with fewer, converting and checking the model take longer than they save
USUAL_S = 60.0  # expected duration of a conversion, for the progress bar


def job_engine(
    job: ScoreJob,
    bundle: Bundle,
    asked: EngineConfig,
    *,
    actors: Actors,
    have: Resources,
    images: int,
    fallback: str | None,
    session: Session,
) -> EngineChoice:
    """The engine that runs the model; see `prepare_engine`. With several nodes, a node with room for an actor converts
    and checks the model, because the node of the driver may have another or a slower CPU, or another ONNX Runtime.

    Args:
        job: the scoring job.
        bundle: the opened bundle.
        asked: the requested engine.
        actors: the actors that will hold the model.
        have: the resources of the cluster.
        images: number of images to score.
        fallback: URI for converted models that cannot be stored beside the bundle; None: there is none.
        session: shows progress.
    """
    request = EngineRequest(
        requested=asked,
        places=places(absolute(job.bundle), fallback),
        gpu=actors.gpus > 0,
        batch_size=job.run.batch_size,
        cpus=max(1, int(actors.cpus)),
        worth_it=images >= WORTH_CONVERTING,
    )
    if have.nodes == 1 or (actors.gpus and not bundle.is_onnx):
        return prepare_engine(bundle, request, session=session)
    prepare = ray.remote(num_cpus=actors.cpus, num_gpus=actors.gpus, max_retries=0)(_prepare)
    task = prepare.remote(absolute(job.bundle), request)
    ((choice, lines),) = wait_for([task], session, title="engines", expected_s=USUAL_S)
    for line in lines:
        session.console.line(line)
    engine: EngineChoice = choice
    return engine


def places(bundle_uri: str, fallback: str | None) -> tuple[str, ...]:
    """URIs where converted models may be stored: beside the bundle, unless it is a whole bucket, and the fallback."""
    # a URI beside a bucket is another bucket, which may belong to someone else
    return (*(() if is_bucket(bundle_uri) else (f"{bundle_uri}.engines",)), *(() if fallback is None else (fallback,)))


class _KeptLines(Console):
    """A console that keeps its lines, which the driver then shows."""

    def __init__(self) -> None:
        super().__init__(terminal=False)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def _prepare(bundle_uri: str, request: EngineRequest) -> tuple[EngineChoice, list[str]]:
    console = _KeptLines()
    session = Session(console=console, stop=Stop(console))
    return prepare_engine(load_bundle(bundle_uri), request, session=session), console.lines


def check_job_storage(job: ScoreJob, *, nodes: int) -> None:
    """Raises ConfigError unless all nodes see the output and the bundle."""
    for name, uri in (("output", job.output), ("bundle", job.bundle)):
        check_storage(uri, is_shared=job.run.storage_is_shared, nodes=nodes, name=name)
