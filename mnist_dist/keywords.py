"""Keyword arguments to configurations: what tyro does for flags, for callers from Python.

A job is a dataclass of nested dataclasses. As on the command line, a field is named by itself, without the dataclass
that it lies in.
"""

import dataclasses
import difflib
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast

import msgspec
import tyro

from mnist_dist.errors import ConfigError

Job = TypeVar("Job")
Function = TypeVar("Function", bound=Callable[..., Any])


def job_of(kind: type[Job], keywords: Mapping[str, Any], *, base: Job | None = None) -> Job:
    """A job with some fields set.

    Args:
        kind: the job's dataclass.
        keywords: values by the name of the field, in whatever nested dataclass that is.
        base: what the other fields are taken from; None: their defaults.

    Raises:
        ConfigError: there is no such field, a value is of another type or out of range, or a field without a default
            is missing.
    """
    names = fields_of(kind)
    for name in keywords:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"no argument of that name ({hint}). Received: {name!r}")
    return cast(Job, _filled(kind, keywords, base))


def fields_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """Type and default (`inspect.Parameter.empty`: none) of each field by its name, nested ones included."""
    found: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if _is_suppressed(kind, field.name):
            continue
        if dataclasses.is_dataclass(hint):
            found |= fields_of(cast(type, hint))
        else:
            found[field.name] = (hint, inspect.Parameter.empty if _is_required(field) else field.default)
    return found


def takes_fields_of(kind: type) -> Callable[[Function], Function]:
    """Names the fields in the signature of a function that ends in `**keywords`, for `help` and for notebooks."""

    def named(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in fields_of(kind).items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return named


def _filled(kind: Any, keywords: Mapping[str, Any], base: Any) -> Any:
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name, hint = field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = getattr(base, name, None)
            values[name] = _filled(hint, keywords, inner)
        elif name in keywords and not _is_suppressed(kind, name):
            values[name] = _checked(name, keywords[name], hint)
        elif base is not None:
            values[name] = getattr(base, name)
        elif _is_required(field):
            raise ConfigError(f"an argument is missing: {name}")
    return kind(**values)


def _plain(value: Any) -> Any:
    """Without paths, NumPy's types and lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _is_suppressed(kind: type, name: str) -> bool:
    """Whether a field is none of a person's: it has no flag."""
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    return typing.get_origin(hint) is Annotated and tyro.conf.Suppress in hint.__metadata__


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its field has it: a path or one of several values may be given alone."""
    value = _plain(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_lone = value is not None and not isinstance(value, tuple)
    if is_lone and any(typing.get_origin(option) is tuple for option in options) and type(value) not in options:
        value = (value,)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as err:
        raise ConfigError(f"{name}: {err}. Received: {name}={value!r}") from err
