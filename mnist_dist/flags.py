"""The flags of a job: what its dataclasses look like on the command line.

Owns: the names, value types, choices and descriptions of flags, and the spelling of settings in messages: `batch_size`
in Python is `--batch-size` for whoever typed it. Does not own: parsing (`command_line.py`).
"""

import ast
import dataclasses
import functools
import re
import shlex
import types
import typing
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_RECEIVED = "Received: "
_WORDS = {int: "INT", float: "FLOAT", str: "TEXT"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A setting of a job, as the command line takes it."""

    field: str
    """Name of the field, such as `batch_size`."""
    hint: Any
    """Type of the field."""
    help: str
    """Its description, in one line."""
    group: type
    """The dataclass that holds the field."""
    aliases: tuple[str, ...] = ()
    is_positional: bool = False
    is_required: bool = False

    @property
    def name(self) -> str:
        """As it is typed: `--batch-size`; `SOURCE` for an argument without a flag."""
        return self.field.upper() if self.is_positional else f"--{self.field.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value: `--plan` and `--no-plan`."""
        return bool in _options(self.hint)

    @property
    def is_number_or_nothing(self) -> bool:
        """Whether its values are None and numbers."""
        options = set(_options(self.hint))
        return type(None) in options and options <= {type(None), int, float}

    @property
    def spellings(self) -> tuple[str, ...]:
        """Everything that can be typed for it."""
        off = (f"--no-{self.name.removeprefix('--')}",) if self.is_switch else ()
        return (self.name, *self.aliases, *off)

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that it takes; empty: others, too."""
        values = [option for option in _options(self.hint) if option is not type(None)]
        return _choices(values[0]) if len(values) == 1 else ()

    @property
    def values(self) -> str:
        """The values that it takes, such as `INT`, `TEXT ...` or `{auto,1,3}`; empty for a switch."""
        return "" if self.is_switch else _described(self.hint)


def flags_of(kind: type) -> list[Flag]:
    """The flags of a job's dataclass and of those nested in it, in their order."""
    import tyro

    flags = list[Flag]()
    hints, helps = typing.get_type_hints(kind, include_extras=True), _descriptions(kind)
    for field in dataclasses.fields(kind):
        hint, marks = _unpacked(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            flags += flags_of(hint)
            continue
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        flags.append(
            Flag(
                field=field.name,
                hint=hint,
                help=" ".join(helps.get(field.name, "").split()),
                group=kind,
                aliases=tuple(aliases),
                is_positional=tyro.conf.Positional in marks,
                is_required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            )
        )
    return flags


def spelled_as_typed(message: str, fields: Container[str]) -> str:
    """A message that ends in `Received: batch_size=0`, with the names of settings replaced by their flags.

    Args:
        message: what a configuration error says.
        fields: names of the settings that are flags.
    """
    text, found, received = message.rpartition(_RECEIVED)
    values = _keywords(received) if found else {}
    if not values or not all(name in fields for name in values):
        return message
    for name in values:
        text = _flags_in(text, name)
    return f"{text}{_RECEIVED}{' '.join(typed(name, value) for name, value in values.items())}"


def typed(field: str, value: Any) -> str:
    """A setting as it is typed: `--epochs 3 4`, `--no-calibration`."""
    name = field.replace("_", "-")
    if value is None or value == ():
        return f"--{name} (nothing)"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values: Iterable[Any] = value if isinstance(value, tuple | list) else (value,)
    return f"--{name} {' '.join(shlex.quote(str(each)) for each in values)}"


def _flags_in(text: str, field: str) -> str:
    """The text with a field's name as a flag: one of several words anywhere, one that is an everyday word (`data`,
    `input`) only at the start."""
    flag = f"--{field.replace('_', '-')}"
    if "_" in field:
        return re.sub(rf"(?<![\w-]){field}(?!\w)", flag, text)
    return re.sub(rf"^((?:--[\w-]+, )*(?:--[\w-]+ and )?){field}(?= |,)", rf"\1{flag}", text)


def _keywords(received: str) -> dict[str, Any]:
    """The names and values of `a=1, b='x'`; empty if it is anything else, such as `a = 1` of a file."""
    if not re.match(r"\w+=", received):
        return {}
    try:
        call = ast.parse(f"f({received})", mode="eval").body
        keywords = call.keywords if isinstance(call, ast.Call) and not call.args else []
        return {each.arg: ast.literal_eval(each.value) for each in keywords if each.arg is not None}
    except (SyntaxError, ValueError):
        return {}


@functools.cache
def _descriptions(kind: type) -> dict[str, str]:
    """Field -> the text under it, of a dataclass and its bases."""
    import docstring_parser

    found = dict[str, str]()
    for each in reversed(kind.__mro__[:-1]):
        parameters = docstring_parser.parse_from_object(each).params
        found |= {item.arg_name: item.description for item in parameters if item.description}
    return found


def _unpacked(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and these."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, the type."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is tuple:
        return _choices(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return ()


def _described(hint: Any) -> str:
    options = [option for option in _options(hint) if option is not type(None)]
    if len(options) > 1:
        literals = [choice for option in options for choice in _choices(option)]
        others = [_described(option) for option in options if not _choices(option)]
        return "|".join([*([f"{{{','.join(literals)}}}"] if literals else []), *others])
    (option,) = options
    if typing.get_origin(option) is tuple:
        first, *rest = typing.get_args(option)
        return f"{_described(first)} ..." if rest == [...] else " ".join(map(_described, (first, *rest)))
    choices = _choices(option)
    return f"{{{','.join(choices)}}}" if choices else _WORDS.get(option, "VALUE")
