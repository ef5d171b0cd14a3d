"""What would break a job, looked for on the driver and on every node of the cluster: `jobs.doctor`.

Owns: who is asked, by one Ray task a node, all at once and with a time-out, and what is shown. Does not own: the
questions (`facts`) or what the answers mean (`checks`). Loads neither TensorFlow nor Keras.

Whatever is broken, the rest is still looked at: without Ray the driver answers for its machine, a node that is silent
is a failed check, and what cannot be tried is skipped and says why.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from pathspec import GitIgnoreSpec
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import mnist_dist
from mnist_dist.config import ModelConfig
from mnist_dist.console import Console, Stop
from mnist_dist.doctor_config import DoctorJob
from mnist_dist.errors import ChecksFailed, ConfigError, first_line
from mnist_dist.models.backbones import backbone_size_px, check_model, published_weights_url
from mnist_dist.models.bundle import BUNDLE_FILE
from mnist_dist.on_ray.cluster import check_storage, connected
from mnist_dist.on_ray.doctor import checks
from mnist_dist.on_ray.doctor.checks import Check, Expected, Pins, Status, named
from mnist_dist.on_ray.doctor.facts import CONNECT_TIMEOUT_S, KERAS_TIMEOUT_S, Facts, Question, gather
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join, temporary_name

ANSWER_TIMEOUT_S = KERAS_TIMEOUT_S + 30
DRIVER, ALL = "driver", "all"
NEEDED = ("jobs", "mnist_dist")
"""What must be sent of the project with a job."""
NEVER_SENT = (".git", ".venv", "venv", "__pycache__")
"""What Ray leaves out by itself (its documentation of `working_dir`)."""
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
    pins = checks.read_pins(Path(mnist_dist.__file__).parents[1])
    question = _question(job, pins)
    console.line("asking this machine and the nodes of Ray; it takes up to two minutes")
    with Stop(console) as stop:
        found = _checks(job, question, pins, Session(console=console, stop=stop))
        every = sorted(found, key=lambda check: list(MARKS).index(check.status))
    for line in (line for check in every for line in lines_of(check)):
        console.line(line)
    names: dict[str, Status] = {"ok": "ok", "warnings": "warning", "failed": "failed", "skipped": "skipped"}
    result: dict[str, Any] = {name: sum(check.status == status for check in every) for name, status in names.items()}
    console.line(", ".join(f"{count} {name}" for name, count in result.items()))
    if job.json:
        result["checks"] = [asdict(check) for check in every]
    failed = [f"{check.name} on {check.node}" for check in every if check.status == "failed"]
    if failed:
        raise ChecksFailed(f"{len(failed)} of {len(every)} checks failed: {', '.join(failed)}", result)
    return result


def lines_of(check: Check) -> list[str]:
    """What a person sees of a check: a mark, what was found, and below it what to do."""
    line = f"{MARKS[check.status]}  {check.name:<16} {check.node:<18} {check.found}"
    return [line, f"      do: {check.remedy}"] if check.remedy else [line]


def _question(job: DoctorJob, pins: Pins) -> Question:
    """What every node is asked for.

    Raises:
        ConfigError: no such backbone, or one without the weights that are named.
    """
    model = ModelConfig(backbone=job.backbone, weights=job.weights)
    row, size_px = check_model(model), backbone_size_px(model)
    is_published = job.weights == "imagenet"
    places = {}
    if job.weights != "none" and not is_published:
        places["weights"] = absolute(job.weights)
    if job.bundle is not None:
        places["bundle"] = join(absolute(job.bundle), BUNDLE_FILE)
    return Question(
        packages=tuple(dict.fromkeys((*pins.versions, *pins.needed))),
        storage=absolute(job.storage),
        places=places,
        weights_url=published_weights_url(row, alpha=model.alpha, image_size_px=size_px) if is_published else None,
    )


def _checks(job: DoctorJob, question: Question, pins: Pins, session: Session) -> Iterator[Check]:
    driver = gather(question, with_keras=False)
    with _probe(question, driver) as probing:
        reached, answers = _ask_ray(job, probing, session)
    yield named(reached, "ray", ALL)
    if not answers:  # then the driver answers for its machine
        driver = gather(question, with_keras=True)
    yield named(storage_for(job, nodes=max(1, len(answers))), "storage", ALL)
    expected = Expected(question=question, driver=driver, pins=pins)
    for node, answer in {DRIVER: driver, **answers}.items():
        yield from checks.node_checks(node, answer, expected)
    yield named(working_dir(Path.cwd()), "working dir", DRIVER)


@contextmanager
def _probe(question: Question, driver: Facts) -> Iterator[Question]:
    """The question with a file that the driver wrote, which every node must see, as long as it is there."""
    if driver.storage_problem != "":
        yield question
        return
    uri = join(question.storage, temporary_name("doctor"))
    ANYWHERE.write_bytes(uri, b"probe")
    try:
        yield replace(question, places={**question.places, "storage": uri})
    finally:
        ANYWHERE.delete(uri)


def _ask_ray(job: DoctorJob, question: Question, session: Session) -> tuple[Check, dict[str, Facts | str]]:
    """Whether there is a Ray, and the answers of its nodes."""
    address = os.environ.get("RAY_ADDRESS", "")
    with ExitStack() as stack:
        try:
            _knock(address)
            have = stack.enter_context(connected(verbose=job.verbose, stop=session.stop))
        except (OSError, RuntimeError, ValueError, RayError) as err:  # what ray.init raises
            return _no_ray(address, err), {}
        found = f"Ray {ray.__version__}, {have}, {f'at {address}' if address else 'private'}"
        remedy = "no node that works is up: ask again when some are"
        return Check("warning" if have.cpus == 0 else "ok", found, remedy), ask_nodes(question, session)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at `host:port`; Ray itself would try for a minute."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _no_ray(address: str, err: Exception) -> Check:
    if address:
        remedy = "unset RAY_ADDRESS to run on this machine alone, or start the cluster it names (ray start --head)"
        return Check("failed", f"RAY_ADDRESS={address}: {first_line(err)}", remedy)
    remedy = "look at the logs in /tmp/ray/session_latest/logs, at free memory and disk, and at who uses Ray's ports"
    return Check("failed", f"a private Ray: {first_line(err)}", remedy)


def ask_nodes(question: Question, session: Session) -> dict[str, Facts | str]:
    """The facts of all alive nodes of the connected Ray, or why a node gave none; by address and begin of the id."""
    nodes = {f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": node for node in ray.nodes() if node["Alive"]}
    asked = {label: _on(node["NodeID"]).remote(question, with_keras=True) for label, node in nodes.items()}
    answers = collect(asked, session, timeout_s=ANSWER_TIMEOUT_S)
    return {
        label: answer if isinstance(answer, str) else replace(answer, ray_gpus=nodes[label]["Resources"].get("GPU", 0))
        for label, answer in answers.items()
    }


def _on(node_id: str) -> Any:
    """The question as a task on that node, which needs none of its CPUs (a cluster's head often offers none)."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(gather).options(scheduling_strategy=pinned)


def collect(references: Mapping[str, Any], session: Session, *, timeout_s: float) -> dict[str, Facts | str]:
    """What some tasks give, or why they gave nothing in time.

    Raises:
        Interrupted: a signal came.
    """
    deadline, tasks = time.monotonic() + timeout_s, list(references.values())
    session.watch(
        lambda seconds: (
            len(ray.wait(tasks, num_returns=len(tasks), timeout=seconds)[0]) == len(tasks)
            or time.monotonic() > deadline
        )
    )
    return {name: _answer_of(reference, timeout_s) for name, reference in references.items()}


def _answer_of(reference: Any, timeout_s: float) -> Facts | str:
    try:
        facts: Facts = ray.get(reference, timeout=0)
    except GetTimeoutError:
        return f"no answer within {timeout_s:.0f} s"
    except RayError as err:  # of a task that raised, the last line says what
        return str(err).strip().splitlines()[-1]
    return facts


# --- what concerns all nodes together, or the driver alone -----------------------------------------------------------


def storage_for(job: DoctorJob, *, nodes: int) -> Check:
    """Whether the jobs would take this storage on so many nodes."""
    try:
        check_storage(job.storage, is_shared=job.storage_is_shared, nodes=nodes)
    except ConfigError as err:
        remedy = "give --storage s3://..., or the absolute path of a folder that nodes share and --storage-is-shared"
        return Check("failed", first_line(err), remedy)
    return Check("ok", f"{job.storage} is fit for {nodes} node(s)")


def working_dir(folder: Path) -> Check:
    """What `ray job submit --working-dir` would send of a folder."""
    sizes = sent_sizes(folder)
    return checks.sent(sizes, left_out=[name for name in NEEDED if (folder / name).exists() and name not in sizes])


def sent_sizes(folder: Path) -> dict[str, int]:
    """Bytes that Ray would send, by the name directly below the folder. Ray packs without compressing.

    Further .gitignore and .rayignore below the folder would leave out more.
    """
    files = [folder / name for name in (".gitignore", ".rayignore")]
    specs = [GitIgnoreSpec.from_lines(NEVER_SENT)]
    specs += [GitIgnoreSpec.from_lines(file.read_text().splitlines()) for file in files if file.is_file()]
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        inside = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not any(spec.match_file(inside / name) for spec in specs)]
        for path in (inside / name for name in names if not any(spec.match_file(inside / name) for spec in specs)):
            if (folder / path).is_file():
                sizes[path.parts[0]] = sizes.get(path.parts[0], 0) + (folder / path).stat().st_size
    return sizes
