"""What would break a job, looked for on the driver and on every node of the cluster: `jobs.doctor`.

Owns: who is asked, by one Ray task a node, all at once and with a time-out, and what is shown. Does not own: the
questions (`doctor_facts`) or what the answers mean (`doctor_checks`). Loads neither TensorFlow nor Keras.

Whatever is broken, the rest is still looked at: without Ray the driver answers for itself, a node that is silent is a
failed check, and what cannot be tried is skipped and says why.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray._private import ray_constants
from ray._private.runtime_env import packaging
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import mnist_dist
from mnist_dist import processor, storage
from mnist_dist.config import ModelConfig
from mnist_dist.console import Console, Stop
from mnist_dist.doctor_config import DoctorJob
from mnist_dist.errors import ChecksFailed, ConfigError, MnistDistError, first_line
from mnist_dist.models.backbones import backbone_size_px, check_model, published_weights_url
from mnist_dist.models.bundle import BUNDLE_FILE, load_bundle
from mnist_dist.on_ray.cluster import Resources, check_storage, connected
from mnist_dist.on_ray.doctor import checks
from mnist_dist.on_ray.doctor import facts as doctor_facts
from mnist_dist.on_ray.doctor.checks import Answer, Check, Pins, Status
from mnist_dist.on_ray.doctor.facts import Question, TensorFlowFacts, ask_tensorflow, facts_from, gather, remove_probe

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0
TENSORFLOW_TIMEOUT_S = 120.0  # importing takes 7 s of a core, and a first time reads half a GiB from the disk
CONNECT_TIMEOUT_S = 5.0
POLL_S = 0.5
DRIVER, ALL = "driver", "all"
NEEDED = ("jobs", "mnist_dist")
"""What a submission must upload of the project."""
MARKS: dict[Status, str] = {"ok": "ok", "skipped": "--", "warning": "!!", "failed": "XX"}
"""In the order in which checks are shown, the worst last."""


def examine(job: DoctorJob, *, console: Console) -> dict[str, Any]:
    """Makes every check and shows it, the worst last.

    Args:
        job: which set-up.
        console: what a person sees.

    Returns:
        `ok`, `warnings`, `failed` (0), `skipped`: the numbers of checks; with `job.json` also `checks`.

    Raises:
        ConfigError: no such backbone, or one without the weights that are named.
        ChecksFailed: at least one check failed; it has the same keys.
    """
    question = _question(job)
    console.line("asking this machine and the nodes of Ray; it takes up to two minutes")
    with Stop(console) as stop:
        every = sorted(_checks(job, question, stop), key=lambda check: list(MARKS).index(check.status))
    for line in (line for check in every for line in lines_of(check)):
        console.line(line)
    result = _counted(every, with_checks=job.json)
    console.line(", ".join(f"{result[name]} {name}" for name in ("ok", "warnings", "failed", "skipped")))
    failed = [f"{check.name} on {check.node}" for check in every if check.status == "failed"]
    if failed:
        raise ChecksFailed(f"{len(failed)} of {len(every)} checks failed: {', '.join(failed)}", result)
    return result


def lines_of(check: Check) -> list[str]:
    """What a person sees of a check: a mark, what was found, and below it what to do."""
    line = f"{MARKS[check.status]}  {check.name:<14} {check.node:<18} {check.found}"
    return [line, f"      do: {check.remedy}"] if check.remedy else [line]


def _counted(every: Sequence[Check], *, with_checks: bool) -> dict[str, Any]:
    names: dict[str, Status] = {"ok": "ok", "warnings": "warning", "failed": "failed", "skipped": "skipped"}
    counts = {name: sum(check.status == status for check in every) for name, status in names.items()}
    return {**counts, "checks": [asdict(check) for check in every]} if with_checks else dict(counts)


def _question(job: DoctorJob) -> Question:
    """What every node is asked for; its own probe is still to be named.

    Raises:
        ConfigError: no such backbone, or one without the weights that are named.
    """
    model = ModelConfig(backbone=job.backbone, weights=job.weights)
    row = check_model(model)
    pins = checks.read_pins(project_root())
    names = (*pins.versions, *pins.needed) if pins else checks.CORE
    return Question(
        packages=tuple(dict.fromkeys([*names, "tf-keras"])),
        storage=storage.absolute(job.storage),
        probe="",
        places=tuple(uri for _, uri in _places(job)),
        weights_url=published_weights_url(row, alpha=model.alpha, image_size_px=backbone_size_px(model))
        if job.weights == "imagenet"
        else None,
    )


def project_root() -> Path:
    """Where constraints.txt and pyproject.toml lie."""
    return Path(mnist_dist.__file__).parents[1]


def _places(job: DoctorJob) -> list[tuple[str, str]]:
    """Name of the flag and URI of what every node must see."""
    places = []
    if job.weights not in ("none", "imagenet"):
        places.append(("weights", storage.absolute(job.weights)))
    if job.bundle is not None:
        places.append(("bundle", storage.join(storage.absolute(job.bundle), BUNDLE_FILE)))
    return places


def _checks(job: DoctorJob, question: Question, stop: Stop) -> Iterator[Check]:
    pins = checks.read_pins(project_root())
    driver = ask_driver(question)
    ray_check, answers = _ask_ray(job, question, stop)
    if ray_check.status == "failed":  # then it answers for the nodes, too
        seen = TensorFlowFacts(**ask_tensorflow(TENSORFLOW_TIMEOUT_S))
        driver = replace(driver, tensorflow=seen)
    yield ray_check
    yield from checks_of([driver, *answers], job=job, question=question, pins=pins)
    yield check_working_dir(Path.cwd())


def checks_of(answers: Sequence[Answer], *, job: DoctorJob, question: Question, pins: Pins | None) -> Iterator[Check]:
    """Every check that the answers decide.

    Args:
        answers: the driver's, and the nodes'.
        job: which set-up.
        question: that was answered.
        pins: None: there is no constraints.txt.
    """
    driver = answers[0].facts
    assert driver is not None, "the driver answers itself"
    yield _storage_for_all(job, nodes=len(answers) - 1)
    for answer in answers:
        yield from checks.node_checks(answer, driver=driver, pins=pins, storage=question.storage)
    if driver.s3 is None:
        yield from (_skipped(name, "nothing named lies on S3") for name in checks.S3_CHECKS)
    yield from _weights(answers, job=job, question=question)
    yield from _bundle(answers, job=job)


# --- asking ----------------------------------------------------------------------------------------------------------


def ask_driver(question: Question) -> Answer:
    """What this process finds; it puts a probe like every node."""
    probe = storage.join(question.storage, storage.temporary_name("doctor"))
    facts = facts_from(gather(replace(question, probe=probe)))
    return with_read_back(Answer(node=DRIVER, facts=facts), probe=probe)


def _ask_ray(job: DoctorJob, question: Question, stop: Stop) -> tuple[Check, list[Answer]]:
    """Whether there is a Ray, and the answers of its nodes."""
    check = Check(name="ray", node=ALL, status="ok", found="", expected="a cluster that answers, or a private one")
    address = os.environ.get("RAY_ADDRESS", "")
    with ExitStack() as stack:
        try:
            _knock(address)
            have = stack.enter_context(connected(verbose=job.verbose, stop=stop))
        except (OSError, RuntimeError, ValueError, RayError) as err:  # what ray.init raises
            return replace(check, status="failed", found=_no_ray(address, err), remedy=_ray_remedy(address)), []
        check = replace(check, found=f"Ray {ray.__version__}, {_words(have, address)}")
        if have.cpus == 0:
            check = replace(check, status="warning", remedy="no node that works is up: ask again when some are")
        return check, ask_nodes(question, check=stop.check)


def _no_ray(address: str, err: Exception) -> str:
    return f"{f'RAY_ADDRESS={address}' if address else 'a private Ray'}: {first_line(err)}"


def _ray_remedy(address: str) -> str:
    if address:
        return "unset RAY_ADDRESS to run on this machine alone, or start the cluster it names (ray start --head)"
    return "look at the logs in /tmp/ray/session_latest/logs, at free memory and disk, and at who else uses Ray's ports"


def _words(have: Resources, address: str) -> str:
    return f"{have}, at {address}" if address else f"{have}, private"


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at `host:port`; Ray itself would try for a minute."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def ask_nodes(
    question: Question,
    *,
    ask: Callable[[Question], dict[str, Any]] = gather,
    timeout_s: float = ANSWER_TIMEOUT_S,
    check: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Asks all alive nodes of the connected Ray at once; who is silent is an answer, too.

    Args:
        question: all but the probe, of which each node has its own.
        ask: what runs on the nodes.
        timeout_s: after which a node is silent; for TensorFlow they have longer.
        check: called all the time; raises what ends the waiting.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    labels = node_labels({node_id: node["NodeManagerAddress"] for node_id, node in nodes.items()})
    asked = {node_id: replace(question, probe=_probe(question, node_id)) for node_id in nodes}
    deadline = time.monotonic() + TENSORFLOW_TIMEOUT_S
    with _sent_by_value():
        facts = {node_id: _on(node_id, ask).remote(asked[node_id]) for node_id in nodes}
        seen = {node_id: _on(node_id, ask_tensorflow).remote(TENSORFLOW_TIMEOUT_S - 5) for node_id in nodes}
    _wait(list(facts.values()), timeout_s=timeout_s, check=check)
    answers = {
        node_id: _answer_of(facts[node_id], node=labels[node_id], resources=node["Resources"], timeout_s=timeout_s)
        for node_id, node in nodes.items()
    }
    answers = {node_id: with_read_back(found, probe=asked[node_id].probe) for node_id, found in answers.items()}
    _remove_unseen({node_id: asked[node_id].probe for node_id, answer in answers.items() if answer.read_back})
    answering = [seen[node_id] for node_id, answer in answers.items() if answer.facts is not None]
    if answering:
        _wait(answering, timeout_s=deadline - time.monotonic(), check=check)
    return [_with_tensorflow(answer, seen[node_id]) for node_id, answer in answers.items()]


def _wait(refs: list[Any], *, timeout_s: float, check: Callable[[], None]) -> None:
    """Waits until all are there, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and len(ray.wait(refs, num_returns=len(refs), timeout=POLL_S)[0]) < len(refs):
        check()


def node_labels(addresses: dict[str, str]) -> dict[str, str]:
    """What people call each node: its address, with the begin of its id where several have the same."""
    known = list(addresses.values())
    return {
        node_id: address if known.count(address) == 1 else f"{address}/{node_id[:6]}"
        for node_id, address in addresses.items()
    }


def _probe(question: Question, node_id: str) -> str:
    return storage.join(question.storage, storage.temporary_name(f"doctor-{node_id[:12]}"))


@contextmanager
def _sent_by_value() -> Iterator[None]:
    """Tasks carry the code of `doctor_facts` with them, so that nodes without this package answer, too."""
    for module in (doctor_facts, processor):
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in (doctor_facts, processor):
            cloudpickle.unregister_pickle_by_value(module)


def _on(node_id: str, function: Any) -> Any:
    """The function as a task on that node, which needs none of its CPUs (a cluster's head often offers none)."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=pinned)


def _answer_of(reference: Any, *, node: str, resources: Mapping[str, float], timeout_s: float) -> Answer:
    answer = Answer(
        node=node, ray_gpus=resources.get("GPU", 0.0), object_store_bytes=resources.get("object_store_memory")
    )
    try:
        return replace(answer, facts=facts_from(ray.get(reference, timeout=0)))
    except ray.exceptions.GetTimeoutError:
        return replace(answer, problem=f"no answer within {timeout_s:.0f} s")
    except RayError as err:
        return replace(answer, problem=f"{type(err).__name__}: {first_line(err)}")


def _with_tensorflow(answer: Answer, reference: Any) -> Answer:
    if answer.facts is None:
        return answer
    try:
        return replace(answer, tensorflow=TensorFlowFacts(**ray.get(reference, timeout=0)))
    except RayError as err:
        words = "no answer in time" if isinstance(err, ray.exceptions.GetTimeoutError) else first_line(err)
        return replace(answer, tensorflow=TensorFlowFacts(problem=words))


def with_read_back(answer: Answer, *, probe: str) -> Answer:
    """The answer with what came of reading its probe, which is deleted."""
    if answer.facts is None or answer.facts.storage_problem != "":
        return answer
    try:
        same = storage.read_bytes(probe) == probe.encode()
        storage.delete(probe)
    except (OSError, MnistDistError) as err:
        return replace(answer, read_back=first_line(err))
    return replace(answer, read_back="" if same else "it reads other bytes than were written")


def _remove_unseen(probes: dict[str, str]) -> None:
    """Deletes the probes that the driver does not see, where they were put."""
    with _sent_by_value():
        gone = [_on(node_id, remove_probe).remote(probe) for node_id, probe in probes.items()]
    if gone:
        ray.wait(gone, num_returns=len(gone), timeout=CONNECT_TIMEOUT_S)


# --- what concerns all nodes together, or the driver alone -----------------------------------------------------------


def _skipped(name: str, why: str) -> Check:
    return Check(name=name, node=ALL, status="skipped", found=why)


def _storage_for_all(job: DoctorJob, *, nodes: int) -> Check:
    """Whether the jobs would take this storage on so many nodes."""
    check = Check(name="storage", node=ALL, status="ok", found=job.storage, expected="a place that every node sees")
    try:
        check_storage(job.storage, is_shared=job.storage_is_shared, nodes=max(1, nodes))
    except ConfigError as err:
        remedy = (
            "give --storage s3://..., or the absolute path of a folder that all nodes share and --storage-is-shared"
        )
        return replace(check, status="failed", found=first_line(err), remedy=remedy)
    return replace(check, found=f"{job.storage} is fit for {max(1, nodes)} node(s)")


def _weights(answers: Sequence[Answer], *, job: DoctorJob, question: Question) -> Iterator[Check]:
    if job.weights == "none":
        yield _skipped("weights", "none are needed")
        return
    for node, facts in _who_trains(answers):
        if question.weights_url is not None and facts.weights is not None:
            yield checks.published_weights(node, facts.weights, url=question.weights_url)
    yield from _seen("weights", answers, job=job)


def _bundle(answers: Sequence[Answer], *, job: DoctorJob) -> Iterator[Check]:
    if job.bundle is None:
        yield _skipped("bundle", "no --bundle is named")
        return
    uri = dict(_places(job))["bundle"]
    driver = answers[0].facts
    if driver is None or driver.places[uri] is None:  # it would be tried for minutes
        yield checks.place("bundle", DRIVER, None, uri=uri)
    else:
        yield whole_bundle(job.bundle)
    yield from (check for check in _seen("bundle", answers, job=job) if check.node != DRIVER)


def _seen(name: str, answers: Sequence[Answer], *, job: DoctorJob) -> Iterator[Check]:
    places = dict(_places(job))
    if name in places:
        for answer in answers:
            if answer.facts is not None:
                uri = places[name]
                yield checks.place(name, answer.node, answer.facts.places[uri], uri=uri)


def _who_trains(answers: Sequence[Answer]) -> Iterator[tuple[str, doctor_facts.Facts]]:
    """The nodes; the driver where there are none."""
    answering = [(answer.node, answer.facts) for answer in answers if answer.facts is not None]
    yield from (answering[1:] or answering)


def whole_bundle(uri: str) -> Check:
    """Whether the bundle is complete and the one it was finished with."""
    check = Check(name="bundle", node=DRIVER, status="ok", found="", expected="a finished bundle")
    try:
        info = load_bundle(uri).info
    except (OSError, MnistDistError) as err:
        remedy = f"name the folder of a finished bundle (it holds {BUNDLE_FILE}), or train it again, as --bundle"
        return replace(check, status="failed", found=first_line(err), remedy=remedy)
    return replace(check, found=f"{uri}: {info.backbone}, {len(info.class_names)} classes, of {info.created_at}")


def check_working_dir(folder: Path) -> Check:
    """What `ray job submit --working-dir` would upload of a folder."""
    try:
        sizes = packed_sizes(folder)
    except OSError as err:
        remedy = f"make {folder} readable, or write what is not into .rayignore"
        return Check(name="working dir", node=DRIVER, status="failed", found=first_line(err), remedy=remedy)
    return checks.working_dir(
        str(folder),
        size_bytes=sum(sizes.values()),
        largest=sorted(sizes.items(), key=lambda item: -item[1]),
        left_out=[name for name in NEEDED if (folder / name).exists() and name not in sizes],
        limit_bytes=packaging.GCS_STORAGE_MAX_SIZE,
    )


def packed_sizes(folder: Path) -> dict[str, int]:
    """Bytes that Ray would pack, by the name directly below the folder that they lie in. Ray packs without compressing.

    What is left out is told by Ray's own code, as `ray job submit` calls it: .gitignore, .rayignore, its own list.
    """
    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            name = path.relative_to(folder).parts[0]
            sizes[name] = sizes.get(name, 0) + path.stat().st_size

    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())],
        add,
        include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=log,
    )
    return sizes
