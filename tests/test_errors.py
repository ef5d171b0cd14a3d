"""errors: the tree as it is drawn, what crosses process borders, and the exit codes."""

import inspect
import pickle
import re

import pytest

from mnist_dist import errors
from mnist_dist.errors import ConfigError, ImageError, Interrupted, MnistDistError

TREE = re.compile(r"^(?P<branch>[│├└─ ]*)(?P<name>\w+)(?: \((?P<also>\w+)\))?  +(?P<meaning>\S.*)$", re.MULTILINE)
CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


def drawn() -> dict[str, tuple[str, ...]]:
    """The bases of each class, as the module's docstring draws them."""
    picture = (errors.__doc__ or "").split("```")[1]
    bases: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for match in TREE.finditer(picture):
        depth = len(match["branch"]) // 4
        path[depth:] = [match["name"]]
        parent = path[depth - 1] if depth else "Exception"
        bases[match["name"]] = (parent, match["also"]) if match["also"] else (parent,)
    return bases


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert drawn() == {found.__name__: tuple(base.__name__ for base in found.__bases__) for found in CLASSES}
    assert len(CLASSES) >= 13


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_the_same_after_a_pickle(kind: type[MnistDistError]) -> None:
    arguments = {ImageError: ("truncated", "the end is missing"), Interrupted: (15, "saved")}
    error = kind(*arguments.get(kind, ("a place, what is allowed. Received: x",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert again.exit_code == error.exit_code


def test_an_image_error_has_a_status_and_a_message() -> None:
    error = ImageError("too_large", "9 x 9 px")
    assert (error.status, error.message, str(error)) == ("too_large", "9 x 9 px", "too_large: 9 x 9 px")


@pytest.mark.parametrize(("signal_number", "exit_code"), [(2, 130), (15, 143)])
def test_an_interruption_ends_with_128_above_its_signal(signal_number: int, exit_code: int) -> None:
    error = Interrupted(signal_number, "saved; run the same command to resume")
    assert error.exit_code == exit_code
    assert str(error) == "saved; run the same command to resume"


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not Interrupted])
def test_wrong_usage_ends_with_2_and_failed_work_with_1(kind: type[MnistDistError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, ConfigError) else 1)
    assert issubclass(kind, ValueError) == issubclass(kind, ConfigError)
