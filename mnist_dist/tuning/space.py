"""Turns a search space into proposals, and a proposal into training jobs.

A proposal is a flat mapping of parameter names to values. A parameter of one backbone carries the backbone's name
(`vgg16.pooling`), so it is never drawn for another. A parameter without effect (the weight decay of an optimizer that
has none) is not drawn.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import optuna

from mnist_dist.config import (
    FitConfig,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    RunConfig,
    SharedRunConfig,
    TrainJob,
)
from mnist_dist.models.backbones import check_model, check_trainable
from mnist_dist.search_config import BackboneSpace, SearchJob

_MAX_VALUES = 20
"""The most values of one choice that are checked before the search begins."""

Params = dict[str, Any]
Stage = Literal["trial", "finalist"]


class Draw(Protocol):
    """Draws a value for each requested parameter, by name."""

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        """Draws one of the values."""

    def log_uniform(self, name: str, low: float, high: float) -> float:
        """Draws a number between the two ends."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The settings that decide a frozen backbone's features and the scoring speed."""

    backbone: str
    weights: str
    alpha: float
    image_size_px: int | None
    pooling: Any

    def model(self) -> ModelConfig:
        """The network with the smallest head."""
        return ModelConfig(
            backbone=self.backbone,
            weights=self.weights,
            alpha=self.alpha,
            image_size_px=self.image_size_px,
            pooling=self.pooling,
        )

    @property
    def name(self) -> str:
        """A short name to show, such as `mobilenet_v2 96 px avg`."""
        width = f" x{self.alpha:g}" if self.alpha != 1 else ""
        size = f" {self.image_size_px} px" if self.image_size_px else ""
        return f"{self.backbone}{width}{size}{f' {self.pooling}' if self.pooling else ''}"


def check_space(job: SearchJob) -> None:
    """Checks the space against the table of backbones and the rules of training jobs.

    Raises:
        ConfigError: for the first setting that is wrong, such as a pooling or cut point that a backbone lacks.
    """
    for space in job.backbones:
        for architecture in architectures_of(space):
            row = check_model(architecture.model())
            if "all" in space.trained:
                check_trainable(row, "all")
            for cut_point in space.cut_points if "fine-tune" in space.trained else ():
                check_trainable(row, int(cut_point) if cut_point.isdecimal() else cut_point)
        for place in range(
            _MAX_VALUES
        ):  # covers every value of each choice with few jobs: building a job checks its values
            train_job(propose(job, _NthDraw(space.backbone, place)), job, stage="finalist")


def architectures_of(space: BackboneSpace) -> list[Architecture]:
    """All architectures of one backbone."""
    return [
        Architecture(backbone=space.backbone, weights=space.weights, alpha=alpha, image_size_px=size, pooling=pooling)
        for alpha, size, pooling in itertools.product(space.alpha, space.image_size_px, space.pooling)
    ]


def propose(job: SearchJob, draw: Draw) -> Params:
    """Draws one configuration."""
    space, params = job.space, Params()

    def choice(name: str, values: Sequence[Any]) -> Any:
        params[name] = draw.choice(name, values) if len(values) > 1 else values[0]
        return params[name]

    def log_uniform(name: str, ends: tuple[float, float]) -> None:
        params[name] = draw.log_uniform(name, *ends) if ends[0] < ends[1] else ends[0]

    by_name = {each.backbone: each for each in job.backbones}
    backbone = by_name[choice("backbone", list(by_name))]
    for name in ("alpha", "image_size_px", "pooling"):
        choice(f"{backbone.backbone}.{name}", getattr(backbone, name))
    trained = choice(f"{backbone.backbone}.trained", backbone.trained)
    if trained == "fine-tune":
        choice(f"{backbone.backbone}.cut_point", backbone.cut_points)
        log_uniform("fine_tune_learning_rate", space.fine_tune_learning_rate)
    if trained == "all":
        choice("augmentation", space.augmentation)
    for name in ("hidden_units", "dropout", "label_smoothing", "batch_size"):
        choice(name, getattr(space, name))
    log_uniform("learning_rate", space.learning_rate)
    if choice("optimizer", space.optimizer) == "adamw":
        log_uniform("weight_decay", space.weight_decay)
    return params


def architecture_of(params: Mapping[str, Any], job: SearchJob) -> Architecture:
    """The architecture of a proposal."""
    name = params["backbone"]
    space = next(space for space in job.backbones if space.backbone == name)
    return Architecture(
        backbone=name,
        weights=space.weights,
        alpha=params[f"{name}.alpha"],
        image_size_px=params[f"{name}.image_size_px"],
        pooling=params[f"{name}.pooling"],
    )


def train_job(params: Mapping[str, Any], job: SearchJob, *, stage: Stage) -> TrainJob:
    """The training job of a proposal.

    Args:
        params: the result of `propose`.
        job: the search.
        stage: a `trial` trains the head on the frozen backbone, or the whole network; a `finalist` also fine-tunes.
    """
    search, model = job.search, architecture_of(params, job).model()
    optimizer = OptimizerConfig(
        optimizer=params["optimizer"],
        weight_decay=params.get("weight_decay", 0.0),
        label_smoothing=params["label_smoothing"],
    )
    return TrainJob(
        data=job.data,
        model=replace(model, hidden_units=params["hidden_units"], dropout=params["dropout"]),
        phases=_phases(params, job, stage=stage),
        optimizer=optimizer,
        fit=FitConfig(
            batch_size=params["batch_size"],
            augmentation=params.get("augmentation", "none"),
            precision=search.precision,
            seed=search.seed,
            best_metric="val_accuracy",
        ),
        run=_run_config(job),
    )


def backbone_job(architecture: Architecture, job: SearchJob) -> TrainJob:
    """A job with the frozen backbone of an architecture, for computing features and measuring speed."""
    fit = FitConfig(batch_size=min(job.space.batch_size), precision=job.search.precision, seed=job.search.seed)
    phases = PhasesConfig(trainable=("head",))
    return TrainJob(data=job.data, model=architecture.model(), phases=phases, fit=fit, run=_run_config(job))


def _run_config(job: SearchJob) -> RunConfig:
    return RunConfig(**{field.name: getattr(job.run, field.name) for field in dataclasses.fields(SharedRunConfig)})


def describe(params: Mapping[str, Any]) -> str:
    """A proposal in one line, for display."""
    shown = []
    for name, value in params.items():
        short = name.rpartition(".")[2].replace("_", " ")
        if isinstance(value, str):
            shown.append(value)
        elif value is not None and (short, value) != ("alpha", 1):
            shown.append(f"{short} {value:.3g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(shown)


def _phases(params: Mapping[str, Any], job: SearchJob, *, stage: Stage) -> PhasesConfig:
    search, trained = job.search, params[f"{params['backbone']}.trained"]
    rate = params["learning_rate"]
    if trained == "all":
        epochs = search.trial_epochs if stage == "trial" else search.finalist_epochs
        return PhasesConfig(epochs=(epochs,), learning_rate=(rate,), trainable=("all",))
    if trained == "head" or stage == "trial":
        return PhasesConfig(epochs=(search.trial_epochs,), learning_rate=(rate,), trainable=("head",))
    return PhasesConfig(
        epochs=(search.trial_epochs, search.fine_tune_epochs),
        learning_rate=(rate, params["fine_tune_learning_rate"]),
        trainable=("head", params[f"{params['backbone']}.cut_point"]),
    )


class _NthDraw:
    """Draws one fixed backbone, and the n-th value of everything else, cyclically."""

    def __init__(self, backbone: str, place: int) -> None:
        self._backbone, self._place = backbone, place

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        return self._backbone if name == "backbone" else values[self._place % len(values)]

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return (low, high)[self._place % 2]


class OptunaDraw:
    """Draws from a trial of an Optuna study."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(name, list(values))

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return self._trial.suggest_float(name, low, high, log=True)


class TypicalDraw:
    """Draws one backbone with settings that usually work: the first value of a choice, the middle of a range."""

    def __init__(self, backbone: str) -> None:
        self._backbone = backbone

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        return self._backbone if name == "backbone" else values[0]

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return math.sqrt(low * high)


class GridDraw:
    """Walks through all combinations: the values of choices, both ends and the geometric middle of ranges.

    Earlier choices decide which parameters follow, so a combination is a path through a tree.
    """

    def __init__(self) -> None:
        self._path: list[tuple[int, int]] = []
        """For each parameter in the order drawn: the index of its value, and the number of values."""
        self._depth = 0

    def proposals(self, job: SearchJob) -> Iterator[Params]:
        """Yields all proposals of a job; checks each of them."""
        while True:
            self._depth = 0
            params = propose(job, self)
            train_job(params, job, stage="finalist")
            yield params
            while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
                self._path.pop()
            if not self._path:
                return
            index, count = self._path.pop()
            self._path.append((index + 1, count))

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        if self._depth == len(self._path):
            self._path.append((0, len(values)))
        index = self._path[self._depth][0]
        self._depth += 1
        return values[index]

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return float(self.choice(name, (low, math.sqrt(low * high), high)))


@dataclass(frozen=True, kw_only=True)
class KnownResult:
    """A proposal of another search, and what it came to."""

    params: Params
    val_accuracy: float


def is_in_space(params: Params, job: SearchJob) -> bool:
    """Whether a space could have given these values: the same parameters, each with a value that may be drawn."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a number outside of its range, and raises for a choice.
        try:
            return propose(job, OptunaDraw(study.ask())) == params
        except (ValueError, UserWarning):
            return False


class Proposer:
    """Proposes configurations by number: a function of the seed, the number and the results of earlier trials.

    The first ones try each backbone once, with settings that usually work (`TypicalDraw`): without a result of its own
    a backbone may never be drawn. A grid covers all of them by itself.

    Args:
        job: the search.
        earlier: results of another search, which the sampler knows from the start. Their backbones count as tried.

    Raises:
        ConfigError: the space has a wrong setting.
    """

    def __init__(self, job: SearchJob, *, earlier: Sequence[KnownResult] = ()) -> None:
        self._job = job
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._grid = list(itertools.islice(GridDraw().proposals(job), job.search.trials)) if self._is_grid else []
        self._open: dict[int, optuna.Trial] = {}
        tried = {result.params["backbone"] for result in earlier}
        self._first = [] if self._is_grid else [each.backbone for each in job.backbones if each.backbone not in tried]
        self._learn(earlier)

    @property
    def _is_grid(self) -> bool:
        return self._job.search.algorithm == "grid"

    @property
    def count(self) -> int:
        """The number of configurations to propose."""
        return len(self._grid) if self._is_grid else self._job.search.trials

    @property
    def untried(self) -> list[str]:
        """The backbones that get no trial at first, because there are fewer trials than backbones."""
        return self._first[self.count :]

    def propose(self, number: int, known: Params | None = None) -> Params:
        """Returns the configuration with a number; call with 0, 1, 2 and so on.

        Args:
            number: number of the trial.
            known: the configuration that an earlier driver proposed under this number, or None.
        """
        if self._is_grid:
            return self._grid[number]
        if known is None and number < len(self._first):
            known = propose(self._job, TypicalDraw(self._first[number]))
        if known is not None:
            self._study.enqueue_trial(known)
        self._study.sampler = self._sampler(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask()
            params = propose(self._job, OptunaDraw(trial))
        self._open[number] = trial
        return params

    def tell(self, number: int, value: float | None) -> None:
        """Receives the result of a trial.

        Args:
            number: number of the trial.
            value: the value to maximise, or None if the trial failed.
        """
        if self._is_grid:
            return
        state = optuna.trial.TrialState.COMPLETE if value is not None else optuna.trial.TrialState.FAIL
        self._study.tell(self._open.pop(number), value, state=state)

    def _learn(self, earlier: Sequence[KnownResult]) -> None:
        """Tells the sampler results that are no trials of this search."""
        sampler, self._study.sampler = self._study.sampler, optuna.samplers.RandomSampler(seed=0)  # It draws nothing.
        for result in earlier if not self._is_grid else ():
            self._study.enqueue_trial(result.params)
            trial = self._study.ask()
            propose(self._job, OptunaDraw(trial))
            self._study.tell(trial, result.val_accuracy)
        self._study.sampler = sampler

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A fresh sampler for each number, so that no state is lost when a driver is killed."""
        seed = (self._job.search.seed * 1_000_003 + number) % 2**32
        if self._job.search.algorithm == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
            )
