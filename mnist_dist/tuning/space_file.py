"""The search space that a person states: a TOML file, or a dict of the same form.

Owns: the form, and every check of it that needs no data; a message names the file, the key and what is allowed. Does
not own: what the space means (`space.py`).

```
learning_rate = { low = 1e-4, high = 1e-2, log = true }   # a setting of all trials: a range,
hidden_units = [0, 128]                                   # some values,
warmup_steps = 100                                        # or a single one

[backbones.mobilenet_v2]                                  # what belongs to one backbone
weights = "imagenet"
image_size_px = [96, 160]
learning_rate = [1e-3, 1e-4]                              # its trials draw from these instead
```
"""

import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any

import msgspec

from mnist_dist.config import DataConfig, FitConfig, ModelConfig, OptimizerConfig, PhasesConfig, require
from mnist_dist.distributions import Choice, Distribution, Range
from mnist_dist.errors import ConfigError, suggestion
from mnist_dist.models.backbones import BACKBONES
from mnist_dist.search_config import CHOICES, RATES, BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute
from mnist_dist.tuning.space import CONDITIONS, SETTINGS, UNLESS_DRAWN, check_space, drawn_for

Stated = str | PathLike[str] | Mapping[str, Any]
"""A path, a URI, or what the file would hold."""
UNSET = "none"
"""Stands for None, which TOML does not have."""
OF_BACKBONE = ("weights", "alpha", "image_size_px", "pooling", "trained", "cut_points")
PARTS_OF_RANGE = ("low", "high", "step", "log")
_CONFIGS = (ModelConfig, OptimizerConfig, FitConfig)
_RECEIVED = re.compile(r"(\w+)=")
_BARE_KEY = re.compile(r"[\w-]+", re.ASCII)
_MAX_WHOLE = 2**31 - 1  # The leaderboard has whole numbers of 32 bits.


@dataclass(frozen=True)
class _Setting:
    """What one value of a setting may be.

    Args:
        name: the setting.
        hint: the type of a value.
        config: the dataclass that checks a value, whose field of that name takes `hint`.
    """

    name: str
    hint: Any
    config: type[Any]

    @property
    def options(self) -> tuple[Any, ...]:
        is_union = typing.get_origin(self.hint) in (types.UnionType, typing.Union)
        return typing.get_args(self.hint) if is_union else (self.hint,)

    @property
    def names(self) -> list[str]:
        """The values of a setting that takes one of some names."""
        return [name for option in self.options for name in typing.get_args(option)]

    @property
    def is_number(self) -> bool:
        return int in self.options or float in self.options

    @property
    def allowed(self) -> str:
        """In words: what the setting takes."""
        names = ", ".join(map(json.dumps, self.names))
        kind = "whole numbers" if int in self.options else "numbers" if self.is_number else names or "text"
        none = f' or "{UNSET}"' if type(None) in self.options else ""
        forms = "one value, a list, or { low = ..., high = ... }" if self.is_number else "one value or a list"
        forms = "one value" if self.name == "weights" else forms
        return f"{self.name} takes {kind}{none} ({forms})"

    def value(self, given: Any) -> Any:
        """Checks one value.

        Raises:
            ConfigError: it has the wrong type, or is out of range.
        """
        if type(None) in self.options and given in (None, UNSET):
            return None
        if self.name == "cut_points" and type(given) is int:
            given = str(given)
        try:
            value = msgspec.convert(given, self.hint)
        except msgspec.ValidationError as err:
            hint = suggestion(given, self.names) if isinstance(given, str) else ""
            raise ConfigError(f"{self.allowed}{hint}. Received: {_shown(self.name, given)}") from err
        self._check_range(value)
        return value

    def _check_range(self, value: Any) -> None:
        if type(value) is int and value > _MAX_WHOLE:
            raise ConfigError(f"{self.name} must be at most {_MAX_WHOLE:,}. Received: {_shown(self.name, value)}")
        require(type(value) is not float or math.isfinite(value), f"{self.name} must be finite", **{self.name: value})
        condition = CONDITIONS.get(self.name)
        names = {field.name for field in fields(self.config)}
        needed = {condition.setting: condition.value} if condition and condition.setting in names else {}
        if self.config is PhasesConfig:
            require(value > 0, f"{self.name} must be above 0", **{self.name: value})
        elif self.config is not BackboneSpace:
            self.config(**{self.name: value}, **needed)

    def distribution(self, given: Any) -> Distribution:
        """Checks one value, a list of them, or a range.

        Raises:
            ConfigError: see `value`; or a range lacks an end.
        """
        if isinstance(given, Mapping):
            return self._range(given)
        values = tuple(map(self.value, given if isinstance(given, list | tuple) else [given]))
        if not values or len(set(values)) < len(values):
            wrong = "lists a value twice" if values else "needs at least one value"
            raise ConfigError(f"{self.name} {wrong}. Received: {_shown(self.name, given)}")
        return Choice(values)

    def _range(self, given: Mapping[str, Any]) -> Range:
        unknown, missing = given.keys() - set(PARTS_OF_RANGE), {"low", "high"} - given.keys()
        received = f"Received: {_shown(self.name, given)}"
        if not self.is_number:
            raise ConfigError(f"{self.allowed}. {received}")
        if unknown or missing:
            hint = suggestion(min(unknown), PARTS_OF_RANGE) if unknown else ""
            raise ConfigError(f"{self.name}: a range has low and high, and step or log if you like{hint}. {received}")
        kind = int if int in self.options else float
        try:
            parts = {name: msgspec.convert(given[name], bool if name == "log" else kind) for name in given}
        except msgspec.ValidationError as err:
            raise ConfigError(f"{self.allowed}; log is true or false. {received}") from err
        with self._named_range(received):
            return Range(**{**parts, "low": self.value(parts["low"]), "high": self.value(parts["high"])})

    @contextmanager
    def _named_range(self, received: str) -> Iterator[None]:
        """Puts the setting before the message of an error, and shows the whole range."""
        try:
            yield
        except ConfigError as err:
            words = str(err).partition(". Received: ")[0].removeprefix(f"{self.name} ")
            raise ConfigError(f"{self.name}: {words}. {received}") from err

    def values(self, given: Any) -> tuple[Any, ...]:
        """Checks what may only be counted values: those of a list, or of a range with a step.

        Raises:
            ConfigError: see `distribution`.
        """
        distribution = self.distribution(given)
        if isinstance(distribution, Choice):
            return distribution.values
        if distribution.step is None:
            raise ConfigError(
                f"{self.name} takes a list, or a range with a step, as each value has features and a speed of its own. "
                f"Received: {_shown(self.name, given)}"
            )
        with self._named_range(f"Received: {_shown(self.name, given)}"):
            return distribution.steps()


def _settings() -> dict[str, _Setting]:
    """Everything that trials may draw."""
    hints = {config: typing.get_type_hints(config) for config in _CONFIGS}
    found = {name: _Setting(name, hints[config][name], config) for config in _CONFIGS for name in hints[config]}
    rates = {name: _Setting(name, float, PhasesConfig) for name in ("learning_rate", "fine_tune_learning_rate")}
    batches = {"batch_size": _Setting("batch_size", int, FitConfig)}  # `auto` is for a single training.
    return {name: (found | rates | batches)[name] for name in SETTINGS}


def _of_backbone() -> dict[str, _Setting]:
    """Everything that belongs to one backbone and is no setting."""
    hints = typing.get_type_hints(BackboneSpace)
    return {name: _Setting(name, _element(hints[name]), BackboneSpace) for name in OF_BACKBONE}


def _element(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def with_space(job: SearchJob, stated: Stated, *, base: SearchJob, given: Collection[str]) -> SearchJob:
    """The job with the space that a person states: flags win over the file, and the file over the recipe.

    Args:
        job: the recipe with the flags.
        stated: the file, or its content.
        base: the recipe without the flags.
        given: the names of the flags that were given.

    Raises:
        ConfigError: the file cannot be read or used; the message names it.
    """
    name = "space" if isinstance(stated, Mapping) else str(stated)
    document = stated if isinstance(stated, Mapping) else _read(str(stated))
    with _named(name):
        space = _stated_space(document, base.space)
        check_space(SearchJob(space=space))
    flags = {setting: getattr(job.space, setting) for setting in (*CHOICES, *RATES) if setting in given}
    backbones = tuple(replace(each, drawn=_without(each.drawn, given)) for each in space.backbones)
    space = replace(space, **flags, backbones=backbones, drawn=_without(space.drawn, given))
    return replace(job, space=space)


def _without(drawn: Mapping[str, Distribution], given: Collection[str]) -> dict[str, Distribution]:
    return {name: each for name, each in drawn.items() if name not in given}


def _read(uri: str) -> dict[str, Any]:
    """Reads a space file."""
    try:
        return tomllib.loads(ANYWHERE.read_bytes(absolute(uri)).decode())
    except FileNotFoundError as err:
        raise ConfigError(
            f"space names a TOML file (docs/search.md), and there is none. Received: space={uri!r}"
        ) from err
    except OSError as err:
        raise ConfigError(f"space must be a TOML file that can be read: {err}. Received: space={uri!r}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{uri} is not TOML: {err}") from err
    except (RecursionError, ValueError) as err:  # tomllib lets them out: too many brackets, or too many digits.
        raise ConfigError(f"{uri} holds a value that cannot be read: {err}") from err


def _stated_space(document: Mapping[str, Any], recipe: SearchSpace) -> SearchSpace:
    """The recipe's space with what a document states.

    Raises:
        ConfigError: a key or a value is wrong, or no trial would draw a setting.
    """
    settings, drawn = _settings(), dict(recipe.drawn)
    for name, given in document.items():
        if name in settings:
            drawn[name] = settings[name].distribution(given)
        elif name != "backbones":
            raise ConfigError(f"{_unknown(name)}. Received: {_shown(name, given)}")
    backbones = recipe.backbones
    if "backbones" in document:
        known = {each.backbone: each for each in recipe.backbones}
        tables = _tables(document["backbones"])
        backbones = tuple(_stated_backbone(name, table, known.get(name)) for name, table in tables.items())
    space = replace(recipe, backbones=backbones, drawn=drawn)
    _check_effects(space, document)
    return space


def _tables(given: Any) -> Mapping[str, Mapping[str, Any]]:
    """The tables of the backbones, which may be listed by name alone."""
    received = f"Received: {_shown('backbones', given)}"
    if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ConfigError(f"backbones names one twice. {received}")
        given = {name: {} for name in given}
    if not isinstance(given, Mapping) or not given or not all(isinstance(table, Mapping) for table in given.values()):
        raise ConfigError(f"backbones takes a list of names, or a table for each, such as [backbones.cnn]. {received}")
    return given


def _stated_backbone(name: str, table: Mapping[str, Any], recipe: BackboneSpace | None) -> BackboneSpace:
    settings, own, names = _settings(), _of_backbone(), ", ".join((*OF_BACKBONE, *SETTINGS))
    values: dict[str, Any] = {}
    drawn = dict(recipe.drawn) if recipe else {}
    with _named(f"[backbones.{_key(name)}]"):
        require("\0" not in name, "the name of a backbone has no NUL", backbone=name)
        for key, given in table.items():
            if key in settings:
                drawn[key] = settings[key].distribution(given)
            elif key == "weights":
                values[key] = own[key].value(given)
            elif key in own:
                values[key] = own[key].values(given)
            else:
                hint = suggestion(key, (*OF_BACKBONE, *SETTINGS))
                raise ConfigError(f"there is no {_key(key)}{hint}; there are {names}. Received: {_shown(key, given)}")
    if recipe is None:  # What nobody trained is not kept frozen.
        whole = values.get("weights", UNSET) == UNSET and name in BACKBONES
        values = {"trained": ("all",) if whole else ("head",), **values}
    return replace(recipe or BackboneSpace(backbone=name), **values, drawn=drawn)


def _check_effects(space: SearchSpace, document: Mapping[str, Any]) -> None:
    """Raises ConfigError where a setting is stated that no trial would draw."""
    job = SearchJob(space=space)
    drawn: set[str] = set()
    for space_of in space.backbones:
        found = drawn_for(job, space_of)
        values: dict[str, Distribution] = {name: Choice((value,)) for name, value in UNLESS_DRAWN.items()}
        values |= {name: each for name, (_, each) in found.items()} | {"trained": Choice(space_of.trained)}
        drawn |= {found[name][0] for name in found if _has_effect(name, values)}
        if "fine-tune" in space_of.trained:
            drawn.add(f"{space_of.backbone}.cut_points")
    stated = [(name, name) for name in document if name in SETTINGS]
    tables = _tables(document["backbones"]) if "backbones" in document else {}
    stated += [
        (name, f"{backbone}.{name}")
        for backbone, table in tables.items()
        for name in table
        if name in (*SETTINGS, "cut_points")
    ]
    for name, parameter in stated:
        if parameter not in drawn:
            condition = "trained = fine-tune" if name == "cut_points" else CONDITIONS.get(name)
            why = f"it needs {condition}" if condition else "each backbone has its own"
            raise ConfigError(f"no trial would draw {parameter}: {why}; leave it out, or add what it needs")


def _has_effect(name: str, drawn: Mapping[str, Distribution]) -> bool:
    condition = CONDITIONS.get(name)
    if condition is None:
        return True
    other = drawn.get(condition.setting)
    return other is not None and any(map(condition.holds, other.grid())) and _has_effect(condition.setting, drawn)


def _unknown(name: str) -> str:
    """Why a key at the top of the file is wrong."""
    if name in OF_BACKBONE:
        return f"{name} belongs to a backbone: write it below [backbones.NAME]"
    flag = f"--{name.replace('_', '-')}"
    if name in {field.name for config in (SearchConfig, DataConfig) for field in fields(config)}:
        return f"{name} is no part of the space: give it as the flag {flag}"
    if name != "backbone" and name in {field.name for config in _CONFIGS for field in fields(config)}:
        return f"{name} is the same for all trials of a search, and no part of the space"
    names = ("backbones", *SETTINGS)
    hint = suggestion(name, names)
    if not hint and (hint := suggestion(name, OF_BACKBONE)):
        hint = f"{hint}, which belongs below [backbones.NAME]"
    return f"there is no {_key(name)}{hint}; there are {', '.join(names)}"


def _shown(name: str, value: Any) -> str:
    """A key and its value, as in the file."""
    return f"{_key(name)} = {_in_toml(value)}"


def _key(name: str) -> str:
    """A key as TOML writes it: in quotes, unless it is a plain word."""
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)


def _in_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_shown(name, each) for name, each in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_in_toml, value))}]"
    return json.dumps(value, default=str)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Puts the place before the message of an error, and shows what was received as TOML does."""
    try:
        yield
    except ConfigError as err:
        words, received, value = str(err).partition("Received: ")
        value = _RECEIVED.sub(r"\1 = ", value)
        raise ConfigError(f"{place}: {words}{received}{value}") from err
    except RecursionError as err:
        raise ConfigError(f"{place}: tables or lists are nested too deeply") from err
