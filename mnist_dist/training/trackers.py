"""The trackers: what is asked of one, and MLflow and Weights & Biases behind that. A new one is a class and an entry.

Each finds its server and account by its own environment variables (`MLFLOW_TRACKING_URI`, `WANDB_API_KEY`,
`WANDB_MODE`, ...), and is imported when a run begins that asks for it. Does not own: when what is logged, or what
happens where a tracker fails (`tracking.py`).
"""

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mnist_dist.config import TrackerName
from mnist_dist.errors import ConfigError, MnistDistError
from mnist_dist.models.history import Epoch

Status = Literal["finished", "stopped", "failed"]
ID_TAG = "mnist_dist.id"
"""The tag of an MLflow run that holds our id of it."""
_MLFLOW_STATUS: Mapping[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_PARAMS_PER_CALL = 100  # MLflow's limit (mlflow/utils/validation.py: MAX_PARAMS_TAGS_PER_BATCH)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as a tracker knows it."""

    id: str
    """Letters and digits; the same whenever the run resumes, and of no other run."""
    project: str
    name: str
    uri: str
    """URI of the run's folder."""
    settings: Mapping[str, Any]
    """What the result depends on, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended; one that did not finish may resume."""

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the finished model, by name."""
    bundle: str | None = None
    """URI of the bundle, if there is one."""


class Tracker(Protocol):
    """What logs one run. Any method may raise anything; nothing is called after that."""

    def begin(self, run: TrackedRun) -> int:
        """Creates the run, or opens it again, and returns the last epoch that was logged; 0: none, or unknown."""

    def epoch(self, epoch: Epoch) -> None:
        """Logs an epoch; they come in order."""

    def end(self, end: End) -> None:
        """Logs the end. It may come again for a run that resumed."""


class MlflowTracker:
    """A run of MLflow, found again by a tag. Uses the client alone, which changes nothing global."""

    def begin(self, run: TrackedRun) -> int:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # It tells stderr of every table of a new database.
        self._client = MlflowClient()
        experiment = self._experiment(run.project)
        found = self._client.search_runs([experiment], filter_string=f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
        tags = {ID_TAG: run.id, "mnist_dist.uri": run.uri}
        opened = found[0] if found else self._client.create_run(experiment, run_name=run.name, tags=tags)
        self._run_id: str = opened.info.run_id
        self._log_settings(run.settings)
        return int(opened.data.metrics.get("epoch", 0))

    def epoch(self, epoch: Epoch) -> None:
        self._log_metrics(epoch.metrics, step=epoch.epoch)

    def end(self, end: End) -> None:
        known = self._client.get_run(self._run_id).data.metrics
        self._log_metrics({name: value for name, value in end.metrics.items() if name not in known}, step=0)
        if end.bundle is not None:
            self._client.set_tag(self._run_id, "mnist_dist.bundle", end.bundle)
        self._client.set_terminated(self._run_id, status=_MLFLOW_STATUS[end.status])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return str(experiment.experiment_id)  # Another run has created it meanwhile.

    def _log_settings(self, settings: Mapping[str, Any]) -> None:
        """Logs parameters; MLflow accepts the same values again."""
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in flat(settings)]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_PER_CALL])

    def _log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=values)


class WandbTracker:
    """A run of Weights & Biases under our own id; offline, each driver leaves a folder of that id to `wandb sync`."""

    def begin(self, run: TrackedRun) -> int:
        import wandb

        is_offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        if not is_offline and not wandb.login(prompt=False):
            raise MnistDistError("it has no API key: run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline")
        # stderr and stdout are the job's own, and the driver's machine is not where the training runs.
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            config={**run.settings, "uri": run.uri},
            allow_val_change=True,
            resume="allow",
            reinit="create_new",  # Finalists of a search are runs beside each other.
            settings=settings,
        )
        return max(0, int(self._run.starting_step) - 1)

    def epoch(self, epoch: Epoch) -> None:
        values = {"phase": epoch.phase, **epoch.metrics}
        self._run.log(values, step=epoch.epoch, commit=True)  # Otherwise it waits for the next epoch.

    def end(self, end: End) -> None:
        bundle = {} if end.bundle is None else {"bundle": end.bundle}
        self._run.summary.update({**end.metrics, **bundle})
        self._run.finish(exit_code=0 if end.status == "finished" else 1)


TRACKERS: Mapping[TrackerName, Callable[[], Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}
"""By name, which is that of the package and of the extra that installs it, too."""


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Checks that trackers are installed here, without importing them.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"this tracker is not installed: pip install 'mnist_dist[{name}]'. Received: {name!r}")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, with names such as `fit.batch_size`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
