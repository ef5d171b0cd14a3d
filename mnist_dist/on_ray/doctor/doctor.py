"""Checks the driver and every node of the cluster for what would break a job: `jobs.doctor`.

Owns: one Ray task per node, all at once and with a time-out, and the output. Does not own: the facts (`facts`) or their
judgement (`checks`). Imports neither TensorFlow nor Keras.

A problem does not stop the other checks: without Ray, only the driver's machine is checked; a node that does not answer
is a failed check; a check that cannot be made is skipped, with the reason.
"""

import os
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
from mnist_dist.environment import RAY_ADDRESS, RAY_TMPDIR
from mnist_dist.errors import ChecksFailed, ConfigError, first_line
from mnist_dist.models.backbones import backbone_size_px, check_model, published_weights_url
from mnist_dist.models.bundle import BUNDLE_FILE
from mnist_dist.on_ray.cluster import check_storage, connected
from mnist_dist.on_ray.doctor import checks
from mnist_dist.on_ray.doctor.checks import IN_PLACE_OF, Check, Expected, Pins, Status, named
from mnist_dist.on_ray.doctor.facts import KERAS_TIMEOUT_S, Facts, Question, gather
from mnist_dist.on_ray.head import (
    RAY_AUTH_MODE,
    RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH,
    TOKEN_REMEDY,
    is_token_sent,
    own_token,
    token_file,
)
from mnist_dist.session import Session, seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join, temporary_name

ANSWER_TIMEOUT_S = KERAS_TIMEOUT_S + 30
DRIVER, ALL = "driver", "all"
NEEDED = ("jobs", "mnist_dist")
"""Folders of the project that must be sent with a job."""
NEVER_SENT = (".git", ".venv", "venv", "__pycache__")
"""What Ray never sends (its documentation of `working_dir`)."""
MARKS: dict[Status, str] = {"ok": "ok", "skipped": "--", "warning": "!!", "failed": "XX"}
"""The mark of each status, in the order in which checks are shown, the worst last."""


def examine(job: DoctorJob, *, console: Console) -> dict[str, Any]:
    """Makes all checks and shows them, the worst last.

    Args:
        job: the set-up to check.
        console: shows the checks.

    Returns:
        `ok`, `warnings`, `failed` (0), `skipped`: the numbers of checks; with `job.json` also `checks`.

    Raises:
        ConfigError: there is no such backbone, or it has no such weights.
        ChecksFailed: at least one check failed; its result has the same keys.
    """
    began_at = started_at(console)
    pins = checks.read_pins(Path(mnist_dist.__file__).parents[1])
    question = _question(job, pins)
    console.line("checking this machine and all nodes of Ray; this takes up to two minutes")
    with Stop(console) as stop:
        results = _checks(job, question, pins, Session(console=console, stop=stop))
        every = sorted(results, key=lambda check: list(MARKS).index(check.status))
    for line in (line for check in every for line in lines_of(check)):
        console.line(line)
    names: dict[str, Status] = {"ok": "ok", "warnings": "warning", "failed": "failed", "skipped": "skipped"}
    result: dict[str, Any] = {name: sum(check.status == status for check in every) for name, status in names.items()}
    console.line(", ".join(f"{count} {name}" for name, count in result.items()))
    result["seconds"] = seconds_since(began_at)
    if job.json:
        result["checks"] = [asdict(check) for check in every]
    failed = [f"{check.name} on {check.node}" for check in every if check.status == "failed"]
    if failed:
        raise ChecksFailed(f"{len(failed)} of {len(every)} checks failed: {', '.join(failed)}", result)
    return result


def lines_of(check: Check) -> list[str]:
    """The output of a check: a line with its mark and what was found, and below it what to do."""
    line = f"{MARKS[check.status]}  {check.name:<16} {check.node:<18} {check.found}"
    return [line, f"      do: {check.remedy}"] if check.remedy else [line]


def _question(job: DoctorJob, pins: Pins) -> Question:
    """The question for every node.

    Raises:
        ConfigError: there is no such backbone, or it has no such weights.
    """
    model = ModelConfig(backbone=job.backbone, weights=job.weights)
    row, size_px = check_model(model), backbone_size_px(model)
    is_published = job.weights == "imagenet"
    places = {}
    if row.imported is not None:
        places["backbone"] = join(absolute(job.backbone), BUNDLE_FILE)
    if job.weights != "none" and not is_published:
        places["weights"] = absolute(job.weights)
    if job.bundle is not None:
        places["bundle"] = join(absolute(job.bundle), BUNDLE_FILE)
    return Question(
        packages=tuple(dict.fromkeys((*pins.versions, *pins.needed, *IN_PLACE_OF.values()))),
        storage=absolute(job.storage),
        places=places,
        weights_url=published_weights_url(row, alpha=model.alpha, image_size_px=size_px) if is_published else None,
    )


def _checks(job: DoctorJob, question: Question, pins: Pins, session: Session) -> Iterator[Check]:
    driver = gather(question, with_keras=False)
    with _probe(question, driver) as probing:
        reached, answers = _ask_ray(job, probing, session)
    yield named(reached, "ray", ALL)
    if not answers:  # Without nodes, the driver's machine is checked in full.
        driver = gather(question, with_keras=True)
    yield named(ray_token(), "ray token", DRIVER)
    yield named(storage_for(job, nodes=max(1, len(answers))), "storage", ALL)
    expected = Expected(question=question, driver=driver, pins=pins)
    for node, answer in {DRIVER: driver, **answers}.items():
        yield from checks.node_checks(node, answer, expected)
    yield named(working_dir(Path.cwd()), "working dir", DRIVER)


@contextmanager
def _probe(question: Question, driver: Facts) -> Iterator[Question]:
    """Adds a file to the question that every node must see; the driver writes it, and deletes it afterwards."""
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
    """Checks that Ray can be reached, and collects the answers of its nodes."""
    address = os.environ.get(RAY_ADDRESS)
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(connected(verbose=job.verbose, stop=session.stop))
        except (OSError, RuntimeError, ValueError, RayError) as err:  # These are what ray.init raises.
            return _no_ray(address, err), {}
        found = f"Ray {ray.__version__}, {cluster}, {f'at {address}' if address else 'private'}"
        remedy = "no worker node is up; try again when there are some"
        return Check("warning" if cluster.cpus == 0 else "ok", found, remedy), ask_nodes(question, session)


def _no_ray(address: str | None, err: Exception) -> Check:
    if address is not None:
        remedy = "unset RAY_ADDRESS to run on this machine alone, or start the cluster it names (ray start --head)"
        return Check("failed", first_line(err), remedy)
    if isinstance(err, ConfigError):
        remedy = f"set {RAY_TMPDIR} to a short path of a folder that can be written, such as {RAY_TMPDIR}=/tmp"
        return Check("failed", first_line(err), remedy)
    remedy = "look at the logs in /tmp/ray/session_latest/logs, at free memory and disk, and at who uses Ray's ports"
    return Check("failed", f"a private Ray: {first_line(err)}", remedy)


def ask_nodes(question: Question, session: Session) -> dict[str, Facts | str]:
    """The facts of all alive nodes, or why a node gave none; by address and the first characters of its id."""
    nodes = {f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": node for node in ray.nodes() if node["Alive"]}
    references = {label: _on(node["NodeID"]).remote(question, with_keras=True) for label, node in nodes.items()}
    answers = collect(references, session, timeout_s=ANSWER_TIMEOUT_S)
    return {
        label: answer if isinstance(answer, str) else replace(answer, ray_gpus=nodes[label]["Resources"].get("GPU", 0))
        for label, answer in answers.items()
    }


def _on(node_id: str) -> Any:
    """The task for one node. It reserves no CPU, because the head of a cluster often offers none."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(gather).options(scheduling_strategy=pinned)


def collect(references: Mapping[str, Any], session: Session, *, timeout_s: float) -> dict[str, Facts | str]:
    """The results of the tasks, or why there was none in time.

    Raises:
        Interrupted: SIGINT or SIGTERM.
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
    except RayError as err:  # If the task raised, the last line of the text has the reason.
        return str(err).strip().splitlines()[-1]
    return facts


def ray_token() -> Check:
    """Says whether this process sends a token to a cluster, and whether Ray would ask for one here."""
    file, is_cluster = token_file(), RAY_ADDRESS in os.environ
    if is_token_sent():
        found = f"sent to a cluster, from {file}, {RAY_AUTH_TOKEN_PATH} or {RAY_AUTH_TOKEN}"
        missing = is_cluster and own_token() is None
        return Check("failed" if missing else "ok", f"{found}{': there is none' if missing else ''}", TOKEN_REMEDY)
    if RAY_AUTH_MODE not in os.environ and file.is_file():
        return Check(
            "ok",
            f"none is sent, but {file} is there: a cluster that `ray start` begins here asks for it, and RAY_ADDRESS "
            f"and `ray job submit` then need {RAY_AUTH_MODE}=token",
        )
    return Check("ok", "none is sent")


# --- checks of all nodes together, or of the driver alone ------------------------------------------------------------


def storage_for(job: DoctorJob, *, nodes: int) -> Check:
    """Checks that jobs would accept this storage with this number of nodes."""
    try:
        check_storage(job.storage, is_shared=job.storage_is_shared, nodes=nodes)
    except ConfigError as err:
        remedy = "give --storage s3://..., or the absolute path of a shared folder with --storage-is-shared"
        return Check("failed", first_line(err), remedy)
    return Check("ok", f"{job.storage} suits {nodes} node(s)")


def working_dir(folder: Path) -> Check:
    """Checks what `ray job submit --working-dir` would send of a folder."""
    sizes = sent_sizes(folder)
    return checks.sent(sizes, left_out=[name for name in NEEDED if (folder / name).exists() and name not in sizes])


def sent_sizes(folder: Path) -> dict[str, int]:
    """Bytes that Ray would send, by name directly below the folder. Ray does not compress them.

    The .gitignore and .rayignore files in subfolders are not read; they would leave out more.
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
