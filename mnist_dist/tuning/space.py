"""Turns a search space into proposals, and a proposal into training jobs.

A proposal is a flat mapping of parameter names to values. A parameter of one backbone carries the backbone's name
(`vgg16.pooling`), so it is never drawn for another. A parameter without effect (the weight decay of an optimizer that
has none) is not drawn.

Words: a *setting* is a field of a training job that trials may differ in (`learning_rate`); a *parameter* is a setting
as a proposal names it (`learning_rate`, or `vgg16.learning_rate` if that backbone has a distribution of its own).
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mnist_dist.distributions import Choice, Distribution
from mnist_dist.errors import ConfigError
from mnist_dist.models.backbones import check_model, check_trainable
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob

_MAX_VALUES = 20
"""The most values of one choice that are checked before the search begins."""

Params = dict[str, Any]
Stage = Literal["trial", "finalist"]


class Draw(Protocol):
    """Draws a value for each requested parameter, by name."""

    def draw(self, name: str, distribution: Distribution) -> Any:
        """Draws a value of a distribution that has several."""


@dataclass(frozen=True)
class Condition:
    """When a setting has an effect: another one has this value, or (None) any value but None."""

    setting: str
    value: str | None

    def holds(self, value: Any) -> bool:
        """Whether a value of the other setting meets it."""
        return value is not None if self.value is None else bool(value == self.value)

    def __str__(self) -> str:
        return f"{self.setting} = {self.value}" if self.value else f"a {self.setting}"


CONDITIONS = {
    "fine_tune_learning_rate": Condition("trained", "fine-tune"),
    "augmentation": Condition("trained", "all"),
    "rand_augment_ops": Condition("augmentation", "rand-augment"),
    "rand_augment_magnitude": Condition("augmentation", "rand-augment"),
    "random_erasing": Condition("trained", "all"),
    "mixup": Condition("trained", "all"),
    "cutmix": Condition("trained", "all"),
    "layer_decay": Condition("trained", "all"),
    "weight_decay": Condition("optimizer", "adamw"),
    "momentum": Condition("optimizer", "sgd"),
    "plateau_patience": Condition("schedule", "constant"),
    "plateau_factor": Condition("plateau_patience", None),
}
SETTINGS = (
    *("fine_tune_learning_rate", "augmentation", "hidden_units", "dropout", "label_smoothing", "batch_size"),
    *("rand_augment_ops", "rand_augment_magnitude", "random_erasing", "mixup", "cutmix", "sampling"),
    *("learning_rate", "optimizer", "weight_decay", "momentum", "schedule", "warmup_steps", "clip_norm"),
    *("ema_decay", "layer_decay"),
    *("class_weights", "plateau_patience", "plateau_factor", "early_stopping_patience"),
    "seed",
)
"""All settings, in the order in which they are drawn: a condition comes before what depends on it."""
UNLESS_DRAWN = {"schedule": OptimizerConfig.schedule}
"""What conditions see of settings that a space need not have."""


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


def drawn_for(job: SearchJob, backbone: BackboneSpace) -> dict[str, tuple[str, Distribution]]:
    """Setting -> parameter and distribution for the trials of a backbone, with or without effect."""
    shared = {name: (name, each) for name, each in job.space.distributions().items()}
    return shared | {name: (f"{backbone.backbone}.{name}", each) for name, each in backbone.drawn.items()}


def propose(job: SearchJob, draw: Draw) -> Params:
    """Draws one configuration."""
    params = Params()

    def take(name: str, distribution: Distribution) -> Any:
        values = distribution.grid()
        params[name] = draw.draw(name, distribution) if len(values) > 1 else values[0]
        return params[name]

    by_name = {each.backbone: each for each in job.backbones}
    backbone = by_name[take("backbone", Choice(tuple(by_name)))]
    for name in ("alpha", "image_size_px", "pooling"):
        take(f"{backbone.backbone}.{name}", Choice(getattr(backbone, name)))
    trained = take(f"{backbone.backbone}.trained", Choice(backbone.trained))
    if trained == "fine-tune":
        take(f"{backbone.backbone}.cut_point", Choice(backbone.cut_points))
    drawn, values = drawn_for(job, backbone), {**UNLESS_DRAWN, "trained": trained}
    for setting in SETTINGS:
        condition = CONDITIONS.get(setting)
        if setting in drawn and (condition is None or condition.holds(values.get(condition.setting))):
            values[setting] = take(*drawn[setting])
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
    own = f"{params['backbone']}."
    values = {name.removeprefix(own): value for name, value in params.items()}
    model = architecture_of(params, job).model()
    fit = FitConfig(precision=job.search.precision, seed=job.search.seed, best_metric="val_accuracy")
    return TrainJob(
        data=job.data,
        model=replace(model, hidden_units=values["hidden_units"], dropout=values["dropout"]),
        phases=_phases(values, job, stage=stage),
        optimizer=OptimizerConfig(**_settings_of(OptimizerConfig, values)),
        fit=replace(fit, **_settings_of(FitConfig, values)),
        run=_run_config(job),
    )


def _settings_of(config: type[OptimizerConfig] | type[FitConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}.intersection(SETTINGS)
    return {name: values[name] for name in names & values.keys()}


def backbone_job(architecture: Architecture, job: SearchJob) -> TrainJob:
    """A job with the frozen backbone of an architecture, for computing features and measuring speed."""
    fit = FitConfig(precision=job.search.precision, seed=job.search.seed)
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


def _phases(values: Mapping[str, Any], job: SearchJob, *, stage: Stage) -> PhasesConfig:
    search, trained, rate = job.search, values["trained"], values["learning_rate"]
    if trained == "all":
        epochs = search.trial_epochs if stage == "trial" else search.finalist_epochs
        return PhasesConfig(epochs=(epochs,), learning_rate=(rate,), trainable=("all",))
    if trained == "head" or stage == "trial":
        return PhasesConfig(epochs=(search.trial_epochs,), learning_rate=(rate,), trainable=("head",))
    return PhasesConfig(
        epochs=(search.trial_epochs, search.fine_tune_epochs),
        learning_rate=(rate, values["fine_tune_learning_rate"]),
        trainable=("head", values["cut_point"]),
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def smallest_batch(job: SearchJob) -> int:
    """The smallest batch size of the space."""
    return int(min(min(drawn_for(job, each)["batch_size"][1].grid()) for each in job.backbones))


def fit_batches(job: SearchJob, *, images: int) -> tuple[SearchJob, list[str]]:
    """The search without the batch sizes above the number of training images, and a line for each change.

    Raises:
        ConfigError: no batch size is left.
    """
    lines: list[str] = []

    def fitted(name: str, sizes: Distribution) -> Distribution:
        left = sizes.at_most(images)
        if left is None:
            raise ConfigError(
                f"batch_size must be at most the number of training images ({images:,}): give a smaller --batch-size. "
                f"Received: {name}={sizes.grid()}"
            )
        if left != sizes:
            lines.append(f"{name} {_left_out(sizes, left)}: {images:,} training images")
        return left

    searched = {each.backbone for each in job.backbones}
    backbones = tuple(
        replace(each, drawn={**each.drawn, "batch_size": fitted(f"{each.backbone}.batch_size", sizes)})
        if (sizes := each.drawn.get("batch_size")) and each.backbone in searched
        else each
        for each in job.space.backbones
    )
    drawn = dict(job.space.drawn)
    if any("batch_size" not in each.drawn for each in job.backbones):
        drawn["batch_size"] = fitted("batch_size", job.space.distributions()["batch_size"])
    return replace(job, space=replace(job.space, backbones=backbones, drawn=drawn)), lines


def _left_out(sizes: Distribution, left: Distribution) -> str:
    if isinstance(sizes, Choice):
        return f"{', '.join(str(size) for size in sizes.values if size not in left.grid())} left out"
    return f"drawn up to {max(left.grid())} instead of {sizes.high}"


# --- one trial for each network --------------------------------------------------------------------------------------


def one_of_each(job: SearchJob, *, batch_of: Callable[[Sequence[int]], int], epochs: int) -> SearchJob:
    """The search as a grid with one trial for each architecture and way to train it, for a rehearsal or a forecast.

    Args:
        job: the search. Of its other settings, the middle one of their values is taken.
        batch_of: chooses one of several batch sizes.
        epochs: of a trial, and of each phase of a finalist.
    """

    def one_of(name: str, distribution: Distribution) -> Choice:
        values = distribution.grid()
        return Choice((batch_of(values) if name == "batch_size" else middle(values),))

    def single(drawn: Mapping[str, Distribution]) -> dict[str, Distribution]:
        return {name: one_of(name, each) for name, each in drawn.items()}

    spaces = job.space.backbones
    backbones = [replace(each, cut_points=(middle(each.cut_points),), drawn=single(each.drawn)) for each in spaces]
    space = replace(job.space, backbones=tuple(backbones), drawn=single(job.space.distributions()))
    search = SearchConfig(
        backbones=job.search.backbones,
        weights=job.search.weights,
        trials=sum(len(architectures_of(each)) * len(each.trained) for each in job.backbones),
        algorithm="grid",
        scheduler="none",
        trial_epochs=epochs,
        finalists=1,
        finalist_epochs=epochs,
        fine_tune_epochs=epochs,
        precision=job.search.precision,
        seed=job.search.seed,
    )
    return replace(job, space=space, search=search)


def middle(values: Sequence[Any]) -> Any:
    """The middle one of some values."""
    return values[len(values) // 2]


# --- ways to draw ----------------------------------------------------------------------------------------------------


class _NthDraw:
    """Draws one fixed backbone, and the n-th value of everything else, cyclically."""

    def __init__(self, backbone: str, place: int) -> None:
        self._backbone, self._place = backbone, place

    def draw(self, name: str, distribution: Distribution) -> Any:
        values = distribution.grid()
        return self._backbone if name == "backbone" else values[self._place % len(values)]


class OptunaDraw:
    """Draws from a trial of an Optuna study."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def draw(self, name: str, distribution: Distribution) -> Any:
        if isinstance(distribution, Choice):
            return self._trial.suggest_categorical(name, list(distribution.values))
        low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
        if distribution.is_whole:
            return self._trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log)
        return self._trial.suggest_float(name, low, high, step=step, log=log)


class TypicalDraw:
    """Draws one backbone with settings that usually work: the first value of a choice, the middle of a range."""

    def __init__(self, backbone: str) -> None:
        self._backbone = backbone

    def draw(self, name: str, distribution: Distribution) -> Any:
        values = distribution.grid()
        if name == "backbone":
            return self._backbone
        return values[0] if isinstance(distribution, Choice) else middle(values)


class GridDraw:
    """Walks through all combinations: the values of choices, both ends and the middle of ranges.

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

    def draw(self, name: str, distribution: Distribution) -> Any:
        values = distribution.grid()
        if self._depth == len(self._path):
            self._path.append((0, len(values)))
        index = self._path[self._depth][0]
        self._depth += 1
        return values[index]


@dataclass(frozen=True, kw_only=True)
class KnownResult:
    """A proposal of another search, and what it came to."""

    params: Params
    val_accuracy: float


def is_in_space(params: Params, job: SearchJob) -> bool:
    """Whether a space could have given these values: the same parameters, each with a value that may be drawn."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
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
