"""The Python API: functions that do what the commands do, print nothing, and leave the process as it was."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import ROOT

import mnist_dist
from mnist_dist import console
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.results import TrainResult

# Trains, scores and evaluates in one process, as a notebook would; everything beside the marked lines would be noise.
SESSION = """
import os, signal, sys, warnings
from pathlib import Path

import mnist_dist

assert not {"ray", "keras", "tensorflow", "pyarrow"} & set(sys.modules)
from mnist_dist.sources.arrays import write_digits

before = signal.getsignal(signal.SIGINT), list(warnings.filters), os.fstat(2).st_ino
trained = mnist_dist.train("quickstart", storage="runs", name="one", epochs=[1], workers=1)
assert 0 <= trained.test_accuracy <= 1 and trained.uri.endswith("runs/one")
assert len(trained.bundle().info.class_names) == 10
write_digits("digits.tar", count=30)
scored = mnist_dist.score(bundle=Path("runs/one/bundle"), input="digits.tar", output="table", top_k=2)
assert scored.images == 30 and scored.statuses["ok"] == 30
assert scored.table(["uri", "top_k"]).num_rows == 30 if "top_k" in scored.table().schema.names else True
assert mnist_dist.read_predictions("table").num_rows == 30
assert "<td>30</td>" in scored._repr_html_()
again = mnist_dist.score(bundle="runs/one/bundle", input="digits.tar", output="table", top_k=2)
assert again.values["skipped"] == 30
evaluated = mnist_dist.evaluate("table")
assert Path(evaluated.report).exists() and evaluated.table().num_rows == 30
assert (signal.getsignal(signal.SIGINT), list(warnings.filters), os.fstat(2).st_ino) == before
print("done")
"""


@pytest.mark.slow
def test_a_python_session_trains_scores_and_evaluates_in_silence(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", SESSION],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=err,
        ).returncode
    assert (code, (tmp_path / "err").read_text()) == (0, "")
    assert (tmp_path / "out").read_text() == "done\n"


def test_the_package_names_what_it_offers() -> None:
    for name in mnist_dist.__all__:
        assert getattr(mnist_dist, name) is not None
    assert set(dir(mnist_dist)) == set(mnist_dist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scoer'"):
        mnist_dist.scoer  # noqa: B018


def test_an_error_is_raised_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="there is no prediction table"):
        mnist_dist.evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"The recipes are quickstart, .*Received: 'nothing'"):
        mnist_dist.train("nothing")
    assert capfd.readouterr() == ("", "")


def test_stderr_and_warnings_are_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    with console.quieted():
        os.write(2, b"[2030-01-02 03:04:05,678 E 1 2] core/worker.cc:12: noise\n")
        os.write(2, b"a line\n")
    os.write(2, b"another\n")
    assert capfd.readouterr().err == "a line\nanother\n"


OVERLAPPING = """
import os
from mnist_dist import console

before = os.fstat(2).st_ino, len(os.listdir("/proc/self/fd"))
first, second = console.quieted(), console.quieted()
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)
os.write(2, b"[2030-01-02 03:04:05,678 E 1 2] core/worker.cc:12: noise\\n")
second.__exit__(None, None, None)
os.write(2, b"after\\n")
assert (os.fstat(2).st_ino, len(os.listdir("/proc/self/fd"))) == before
"""


def test_blocks_that_overlap_give_stderr_back_at_the_end_of_the_last_and_keep_no_file_open() -> None:
    done = subprocess.run([sys.executable, "-c", OVERLAPPING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "after\n")


def test_what_a_plan_does_not_give_is_said() -> None:
    with pytest.raises(DataError, match="the job gave no run_dir: a plan and a dry run give plan, seconds"):
        TrainResult({"plan": True, "seconds": 1.5}).uri  # noqa: B018


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    before, errors = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        try:
            with console.Stop(console.Console(silent=True, embedded=True)) as stop:
                stop.check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_interrupts_a_python_session() -> None:
    with console.Stop(console.Console(silent=True, embedded=True)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            os.kill(os.getpid(), signal.SIGINT)
