"""Builds configurations from keyword arguments: the counterpart of tyro's flags for Python callers.

A job is a dataclass of nested dataclasses. As on the command line, a field is given by its own name, without the name
of its dataclass.
"""

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast

import msgspec
import tyro

from mnist_dist.errors import ConfigError, suggestion

Job = TypeVar("Job")
Function = TypeVar("Function", bound=Callable[..., Any])


def job_of(kind: type[Job], keywords: Mapping[str, Any], *, base: Job | None = None) -> Job:
    """Builds a job with some fields set.

    Args:
        kind: the job's dataclass.
        keywords: field name -> value; the field may be in any nested dataclass.
        base: supplies the other fields; None: their defaults.

    Raises:
        ConfigError: there is no such field, a value has the wrong type or is out of range, or a required field is
            missing.
    """
    names = fields_of(kind)
    for name in keywords:
        if name not in names:
            hint = suggestion(name, names) or f" (there are {', '.join(names)})"
            raise ConfigError(f"there is no argument of that name{hint}. Received: {name!r}")
    return cast(Job, _filled(kind, keywords, base))


def fields_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, default), including nested fields; `inspect.Parameter.empty` stands for no default."""
    fields: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if field.name in _without_flags(kind):
            continue
        if dataclasses.is_dataclass(hint):
            fields |= fields_of(cast(type, hint))
        else:
            fields[field.name] = (hint, inspect.Parameter.empty if _is_required(field) else field.default)
    return fields


def takes_fields_of(kind: type) -> Callable[[Function], Function]:
    """Adds the fields to the signature of a function that ends in `**keywords`, for `help` and notebooks."""

    def named(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
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
        elif name in keywords and name not in _without_flags(kind):
            values[name] = _checked(name, keywords[name], hint)
        elif base is not None:
            values[name] = getattr(base, name)
        elif _is_required(field):
            raise ConfigError(f"missing argument: {name}")
    return kind(**values)


def _plain(value: Any) -> Any:
    """The value with paths as strings, NumPy values as Python's own, and lists as tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


@functools.cache
def _without_flags(kind: type) -> frozenset[str]:
    """The fields that users cannot set: tyro makes no flags of them either."""
    hints = typing.get_type_hints(kind, include_extras=True)
    annotated = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is Annotated}
    return frozenset(name for name, hint in annotated.items() if tyro.conf.Suppress in hint.__metadata__)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value converted to its field's type; a lone value becomes a tuple if needed."""
    value = _plain(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_lone = value is not None and not isinstance(value, tuple)
    if is_lone and any(typing.get_origin(option) is tuple for option in options) and type(value) not in options:
        value = (value,)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as err:
        raise ConfigError(f"{name}: {err}. Received: {name}={value!r}") from err
