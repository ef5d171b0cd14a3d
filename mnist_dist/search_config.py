"""The configuration of a hyperparameter search: what is varied, how it is searched, what it may cost.

Owns: the fields of a search, as `config.py` owns those of training and scoring. Does not own: drawing from the space
(`search/space.py`) or the named searches (`recipes.py`).
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from mnist_dist.config import Augmentation, DataConfig, Pooling, Precision, SharedRunConfig, require

OptimizerName = Literal["adam", "adamw", "sgd"]
Trained = Literal["head", "fine-tune", "all"]


@dataclass(frozen=True, kw_only=True)
class BackboneSpace:
    """One backbone, and what is varied of it alone: nothing here is ever combined with another backbone."""

    backbone: str
    """A name from the table in `mnist_dist/models/backbones.py`."""
    weights: str = "none"
    """As in training."""
    alpha: tuple[float, ...] = (1.0,)
    """Width multipliers."""
    image_size_px: tuple[int | None, ...] = (None,)
    """Height and width that the backbone sees, px; None: as in training."""
    pooling: tuple[Pooling | None, ...] = (None,)
    """How a feature map becomes a vector; None: the backbone's own way."""
    trained: tuple[Trained, ...] = ("head",)
    """`head`: the backbone stays frozen. `fine-tune`: the same, and a finalist is then trained from a cut point on.
    `all`: everything is trained from the start, also in the trials."""
    cut_points: tuple[str, ...] = ("all",)
    """fine-tune only: cut points of the backbone, numbers of first layers that stay frozen, or `all`."""

    def __post_init__(self) -> None:
        for name in ("alpha", "image_size_px", "pooling", "trained", "cut_points"):
            require(bool(getattr(self, name)), f"{name} of {self.backbone} has at least one value", **{name: ()})


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What is varied. Several values: one of them is chosen; learning rates and decay: log-uniform between two."""

    backbones: Annotated[tuple[BackboneSpace, ...], tyro.conf.Suppress] = ()
    hidden_units: tuple[int, ...] = (0, 128, 256)
    """Widths of a dense layer between backbone and output; 0: the backbone's own (none but for `conv_base`)."""
    dropout: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Before the output, each in [0, 1)."""
    optimizer: tuple[OptimizerName, ...] = ("adam", "adamw", "sgd")
    """As in training."""
    learning_rate: tuple[float, float] = (1e-4, 1e-2)
    """Lowest and highest peak learning rate of what a trial trains."""
    fine_tune_learning_rate: tuple[float, float] = (1e-6, 1e-4)
    """Lowest and highest peak learning rate of fine-tuning."""
    weight_decay: tuple[float, float] = (1e-5, 1e-2)
    """adamw only: lowest and highest decay."""
    label_smoothing: tuple[float, ...] = (0.0, 0.1)
    """Each in [0, 1)."""
    augmentation: tuple[Augmentation, ...] = ("none",)
    """For networks that are trained whole; a frozen backbone sees images as they are."""
    batch_size: tuple[int, ...] = (64, 128, 256)
    """Images per step over all workers together."""

    def __post_init__(self) -> None:
        choices = ("hidden_units", "dropout", "optimizer", "label_smoothing", "augmentation", "batch_size")
        for name in choices:
            require(bool(getattr(self, name)), f"{name} has at least one value", **{name: ()})
        for name in ("learning_rate", "fine_tune_learning_rate", "weight_decay"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"{name} is a lowest and a highest value above 0", **{name: (low, high)})


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the space is searched."""

    backbones: tuple[str, ...] = ()
    """Only these of the recipe's backbones. Empty: all."""
    weights: tuple[str, ...] = ()
    """Weights for backbones, such as `vgg16=PATH mobilenet_v2=none`, in place of the recipe's."""
    trials: int = 30
    """Configurations that are tried."""
    hours: float | None = None
    """Time after which no more of them are begun, h. None: no limit."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). grid: all combinations, ranges by their
    ends and their middle."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: trials that lag behind are stopped early (Li et al. 2018)."""
    trial_epochs: int = 10
    """Epochs of a trial that is not stopped."""
    finalists: int = 3
    """The best trials, which are then trained for real by Ray Train; the best of them is the winner."""
    finalist_epochs: int = 15
    """Epochs of a finalist that is trained whole."""
    fine_tune_epochs: int = 5
    """Epochs of a finalist's fine-tuning, after `trial_epochs` of its head."""
    precision: Precision = "auto"
    """As in training."""
    seed: int = 0
    """Decides what is proposed, and every trial's weights and batches."""

    def __post_init__(self) -> None:
        for name in ("trials", "trial_epochs", "finalists", "finalist_epochs", "fine_tune_epochs"):
            require(getattr(self, name) >= 1, f"{name} is at least 1", **{name: getattr(self, name)})
        require(self.hours is None or self.hours > 0, "hours is positive", hours=self.hours)
        require(self.seed >= 0, "seed is 0 or above", seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SearchRunConfig(SharedRunConfig):
    """Where the search lives and what may be spent on it. A resumed search may change only these fields, but for those
    of the feature cache."""

    cpus_per_trial: float = 1.0
    """CPUs that each trial reserves and uses."""
    gpus_per_trial: float | None = None
    """GPUs of each trial, also parts of one. None: a quarter where the cluster has GPUs, else 0."""
    concurrent_trials: int | None = None
    """Trials at the same time. None: as many as find room. With 1, the same seed proposes the same trials."""

    def __post_init__(self) -> None:
        super().__post_init__()
        trials, gpus = self.concurrent_trials, self.gpus_per_trial
        require(trials is None or trials > 0, "concurrent_trials is positive", concurrent_trials=trials)
        require(self.cpus_per_trial > 0, "cpus_per_trial is positive", cpus_per_trial=self.cpus_per_trial)
        require(gpus is None or gpus >= 0, "gpus_per_trial is 0 or above", gpus_per_trial=gpus)


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """Everything that a search is made of."""

    data: DataConfig = field(default_factory=DataConfig)
    space: SearchSpace = SearchSpace()
    search: SearchConfig = SearchConfig()
    run: SearchRunConfig = SearchRunConfig()

    @property
    def backbones(self) -> tuple[BackboneSpace, ...]:
        """The backbones that are searched, with the weights asked for.

        Raises:
            ConfigError: the space is empty, or a name is not in it.
        """
        known = {space.backbone: space for space in self.space.backbones}
        weights = {name: uri for name, _, uri in (pair.partition("=") for pair in self.search.weights)}
        for name in (*self.search.backbones, *weights):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            require(name in known, f"this search's backbones are {', '.join(known)}{hint}", backbone=name)
        for name, uri in weights.items():
            require(bool(uri), "weights are given as backbone=PATH", weights=name)
        chosen = [space for name, space in known.items() if not self.search.backbones or name in self.search.backbones]
        require(bool(chosen), "the space has at least one backbone", backbones=())
        return tuple(replace(space, weights=weights.get(space.backbone, space.weights)) for space in chosen)

    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON values: everything but `run`."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        del values["run"]
        return dict(values)

    def settings_hash(self) -> str:
        """First 8 hexadecimal digits of the sha256 of `settings()`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
