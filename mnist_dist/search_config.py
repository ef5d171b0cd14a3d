"""The configuration of a hyperparameter search: the space, the algorithm and the resources.

Owns: the fields of a search, as `config.py` owns those of training and scoring. Does not own: drawing from the space
(`tuning/space.py`), the file that states one (`tuning/space_file.py`) or the named searches (`recipes.py`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from mnist_dist.config import (
    Augmentation,
    DataConfig,
    Pooling,
    Precision,
    SharedRunConfig,
    StoreConfig,
    may_be_bundle,
    require,
)
from mnist_dist.distributions import Choice, Distribution, Range
from mnist_dist.errors import suggestion
from mnist_dist.urls import shown_values

OptimizerName = Literal["adam", "adamw", "sgd"]
Trained = Literal["head", "fine-tune", "all"]
CombineFinalists = Literal["none", "soup", "ensemble"]
CHOICES = ("hidden_units", "dropout", "optimizer", "label_smoothing", "augmentation", "batch_size")
RATES = ("learning_rate", "fine_tune_learning_rate", "weight_decay")
"""The fields of `SearchSpace` that list values, and those that are the ends of a range."""


@dataclass(frozen=True, kw_only=True)
class BackboneSpace:
    """One backbone and the choices that apply to it alone; they are never combined with another backbone."""

    backbone: str
    """As in training: a name, or the URI of a bundle."""
    weights: str = "none"
    """Initial weights, as in training."""
    alpha: tuple[float, ...] = (1.0,)
    """Width multipliers to try."""
    image_size_px: tuple[int | None, ...] = (None,)
    """Height and width of the backbone's input, px. None: as in training."""
    pooling: tuple[Pooling | None, ...] = (None,)
    """How to turn a feature map into a vector. None: the backbone's default."""
    trained: tuple[Trained, ...] = ("head",)
    """`head`: the backbone stays frozen. `fine-tune`: it stays frozen in trials; finalists then train it from a cut
    point on. `all`: trials and finalists train the whole network."""
    cut_points: tuple[str, ...] = ("all",)
    """fine-tune only: cut points of the backbone, how many first layers stay frozen, or `all`."""
    drawn: Mapping[str, Distribution] = field(default_factory=dict, hash=False)
    """From a space file: what the trials of this backbone draw instead of what all trials share, by the setting."""

    def __post_init__(self) -> None:
        for name in ("alpha", "image_size_px", "pooling", "trained", "cut_points"):
            require(bool(getattr(self, name)), f"{name} of {self.backbone} needs at least one value", **{name: ()})


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The search space. Learning rates and decay are log-uniform between two bounds; other fields list their
    choices."""

    backbones: Annotated[tuple[BackboneSpace, ...], tyro.conf.Suppress] = ()
    hidden_units: tuple[int, ...] = (0, 128, 256)
    """Widths of a dense layer between backbone and output. 0: the backbone's default (none, except for `conv_base`)."""
    dropout: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Dropout rates before the output, each in [0, 1)."""
    optimizer: tuple[OptimizerName, ...] = ("adam", "adamw", "sgd")
    """Optimizers to try, as in training."""
    learning_rate: tuple[float, float] = (1e-4, 1e-2)
    """Lowest and highest peak learning rate of a trial."""
    fine_tune_learning_rate: tuple[float, float] = (1e-6, 1e-4)
    """Lowest and highest peak learning rate of fine-tuning."""
    weight_decay: tuple[float, float] = (1e-5, 1e-2)
    """adamw only: lowest and highest decay."""
    label_smoothing: tuple[float, ...] = (0.0, 0.1)
    """Label smoothing values, each in [0, 1)."""
    augmentation: tuple[Augmentation, ...] = ("none",)
    """Augmentations to try for networks that are trained whole; a frozen backbone gets unchanged images."""
    batch_size: tuple[int, ...] = (64, 128, 256)
    """Images per step, summed over all workers. Those above the number of training images are left out."""
    drawn: Annotated[Mapping[str, Distribution], tyro.conf.Suppress] = field(default_factory=dict, hash=False)
    """From a space file: what all trials draw, by the setting; instead of the field of that name, or in addition."""

    def __post_init__(self) -> None:
        for name in CHOICES:
            require(bool(getattr(self, name)), f"{name} needs at least one value", **{name: ()})
        for name in RATES:
            low, high = getattr(self, name)
            require(0 < low <= high, f"{name} must be a lowest and a highest value above 0", **{name: (low, high)})

    def distributions(self) -> dict[str, Distribution]:
        """What all trials draw, by the setting."""
        choices = {name: Choice(getattr(self, name)) for name in CHOICES}
        ends = {name: getattr(self, name) for name in RATES}
        rates = {name: Range(low=low, high=high, log=True) for name, (low, high) in ends.items()}
        return {**choices, **rates, **self.drawn}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search the space."""

    space: str | None = None
    """File or object with the search space (TOML; docs/search.md). What it leaves out is as in the recipe; flags win
    over it. A search keeps what the file says, not where it lies."""
    backbones: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--backbone",))] = ()
    """Search only these: names of the recipe's backbones, and folders or bucket prefixes of bundles that `import`
    wrote, whose features heads are trained on. Empty: all of the recipe's."""
    weights: tuple[str, ...] = ()
    """Weights of single backbones, such as `vgg16=PATH mobilenet_v2=none`, instead of the recipe's."""
    trials: int = 30
    """Number of configurations to try."""
    hours: float | None = None
    """Hours for the whole search, summed over all times it is resumed, finalists included: trials end early enough for
    the finalists, as far as the trials allow to forecast them. A finalist is never cut off. None: no limit."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). grid: all combinations; of a range, its
    ends and its middle."""
    scheduler: Literal["asha", "hyperband", "median", "none"] = "asha"
    """Which trials to stop early. asha: at 1/9 and 1/3 of the epochs, those not among the best third (Li et al. 2018).
    hyperband: asynchronous HyperBand; asha that begins later for some trials (Li et al. 2017). median: those below the
    median of the others at the same epoch (Golovin et al. 2017)."""
    grace_steps: int = 500
    """A trial takes at least this many steps before it may be stopped early, whatever its batch size: networks with
    BatchNorm are slow starters."""
    trial_epochs: int = 10
    """Epochs of a trial that is not stopped early."""
    finalists: int = 3
    """How many of the best trials Ray Train then trains fully; the best of these wins. With `hours` only as many as are
    forecast to fit into a quarter of the time, but at least one."""
    finalist_epochs: int = 15
    """Epochs of a finalist whose whole network is trained."""
    fine_tune_epochs: int = 5
    """Fine-tuning epochs of a finalist, after `trial_epochs` of its head."""
    combine: CombineFinalists = "none"
    """Make one bundle of the finalists, and return it instead of the winner's where its validation accuracy is not
    lower by more than chance. soup: a greedy soup of those of the winner's architecture. ensemble: of those with the
    winner's input."""
    precision: Precision = "auto"
    """Precision of the training step, as in training."""
    seed: int = 0
    """Seed of the proposed configurations and of every trial's weights and batches."""
    like: str | None = None
    """tpe only: an earlier search, as the name of its folder in `--storage` or as a URI. The sampler knows the results
    of its finished trials from the start, if the space holds them; they are no trials of this search."""

    def __post_init__(self) -> None:
        require(self.grace_steps >= 0, "grace_steps must be 0 or above", grace_steps=self.grace_steps)
        knows = self.like is None or self.algorithm == "tpe"
        require(knows, "like needs --algorithm tpe", like=self.like, algorithm=self.algorithm)
        for name in ("trials", "trial_epochs", "finalists", "finalist_epochs", "fine_tune_epochs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", **{name: getattr(self, name)})
        require(
            self.combine == "none" or self.finalists >= 2,
            "combine needs finalists of at least 2",
            combine=self.combine,
            finalists=self.finalists,
        )
        require(self.hours is None or self.hours > 0, "hours must be positive", hours=self.hours)
        require(self.seed >= 0, "seed must be 0 or above", seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SearchRunConfig(SharedRunConfig):
    """Storage and resources. A resumed search may change only these fields, except those of the feature cache."""

    cpus_per_trial: float = 1.0
    """CPUs that each trial reserves and uses."""
    gpus_per_trial: float | None = None
    """GPUs per trial, fractions allowed. None: a quarter if the cluster has GPUs, else 0."""
    concurrent_trials: int | None = None
    """Trials to run at the same time. None: as many as fit. With 1, the same seed proposes the same trials."""
    dry_run: bool = False
    """Check everything, train a step of one trial per network and of a finalist; keep nothing."""
    plan: bool = False
    """Measure features, trials and finalists on a sample in a scratch storage on the cluster, report the bottleneck and
    how long the whole search would take, and keep nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.plan and self.dry_run), "choose either plan or dry_run", plan=True, dry_run=True)
        trials, gpus = self.concurrent_trials, self.gpus_per_trial
        require(trials is None or trials > 0, "concurrent_trials must be positive", concurrent_trials=trials)
        require(self.cpus_per_trial > 0, "cpus_per_trial must be positive", cpus_per_trial=self.cpus_per_trial)
        require(gpus is None or gpus >= 0, "gpus_per_trial must be 0 or above", gpus_per_trial=gpus)


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """The complete configuration of a search."""

    data: DataConfig = field(default_factory=DataConfig)
    space: SearchSpace = SearchSpace()
    search: SearchConfig = SearchConfig()
    store: StoreConfig = field(default_factory=StoreConfig)
    run: SearchRunConfig = SearchRunConfig()

    def __post_init__(self) -> None:
        require(
            not self.data.has_sets,
            "a search compares accuracies, so its images have one class each; with multi_label use train",
            multi_label=True,
        )

    @property
    def backbones(self) -> tuple[BackboneSpace, ...]:
        """The backbones to search, with the requested weights.

        Raises:
            ConfigError: the space is empty, or a name is not in it.
        """
        known = {space.backbone: space for space in self.space.backbones}
        imported = filter(may_be_bundle, self.search.backbones)
        known |= {name: BackboneSpace(backbone=name) for name in imported if name not in known}
        weights = {name: uri for name, _, uri in (pair.partition("=") for pair in self.search.weights)}
        for name in (*self.search.backbones, *weights):
            names = f"{', '.join(known)}{suggestion(name, known)}"
            require(name in known, f"backbones of this search are {names}", backbone=name)
        for name, uri in weights.items():
            require(bool(uri), "weights must be given as backbone=PATH", weights=name)
        chosen = [space for name, space in known.items() if not self.search.backbones or name in self.search.backbones]
        require(bool(chosen), "the space needs at least one backbone", backbones=())
        return tuple(replace(space, weights=weights.get(space.backbone, space.weights)) for space in chosen)

    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON values: everything but `store` and `run`, and no secrets."""
        values = shown_values(json.loads(json.dumps(dataclasses.asdict(self))))
        del values["store"], values["run"], values["search"]["space"]
        return dict(values)

    def settings_hash(self) -> str:
        """First 8 hexadecimal digits of the sha256 of `settings()`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
