"""Documents: what is written is what is read, and what does not fit is named."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from harness import ROOT

from mnist_dist import documents
from mnist_dist.errors import DataError
from mnist_dist.store.anywhere import ANYWHERE


@dataclass(frozen=True, kw_only=True)
class Inner:
    precision: Literal["float32", "int8"]
    difference: float


@dataclass(frozen=True, kw_only=True)
class Outer:
    names: tuple[str, ...]
    inner: Inner | None = None
    values: dict[str, Any] = field(default_factory=dict)


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.json")
    document = Outer(names=("a", "b"), inner=Inner(precision="int8", difference=0.5), values={"k": [1, None, "x"]})
    documents.write(ANYWHERE, uri, document)
    assert documents.read(ANYWHERE, uri, Outer) == document


def test_a_number_that_is_none_stays_one() -> None:
    data = documents.encode(Inner(precision="int8", difference=math.nan))
    assert math.isnan(documents.decode(data, Inner, uri="x").difference)


def test_a_missing_field_takes_its_default_and_an_unknown_one_is_left_out() -> None:
    assert documents.decode(b'{"names": ["a"], "later": 1}', Outer, uri="x") == Outer(names=("a",))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "x/y.json is not a Outer: Expecting"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"inner": null}', "missing required field `names`"),
        (b'{"names": [], "inner": {"precision": "half", "difference": 1.0}}', r"Invalid enum value 'half'.*inner"),
    ],
)
def test_what_does_not_fit_is_named(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        documents.decode(data, Outer, uri="x/y.json")


MEETING = """
import dataclasses, sys, threading
from concurrent.futures import ThreadPoolExecutor
from mnist_dist import documents

sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(8) as pool:
    for _ in range(300):
        names = [f"field_{number}" for number in range(9)]
        inner = dataclasses.make_dataclass("Inner", [(name, float) for name in names])
        outer = dataclasses.make_dataclass("Outer", [*((name, int) for name in names), ("more", tuple[inner, ...])])
        data = documents.encode({**dict.fromkeys(names, 1), "more": [dict.fromkeys(names, 0.5)]})
        barrier = threading.Barrier(8)

        def read(_):
            barrier.wait()
            return documents.decode(data, outer, uri="x")

        assert len({document.more[0].field_8 for document in pool.map(read, range(8))}) == 1
"""


def test_threads_that_meet_a_class_at_once_do_not_crash_the_process() -> None:
    ended = subprocess.run([sys.executable, "-c", MEETING], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
