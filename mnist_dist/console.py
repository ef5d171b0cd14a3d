"""The user interface of a job: one progress bar and plain lines, one JSON line at the end.

Owns: everything shown on stderr, silencing Ray, TensorFlow and oneDNN, the exit code, and the JSON line, the last line
on stdout. Does not own: parsing flags (`command_line.py`). `Stop` handles signals; the job polls it.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, NoReturn, cast

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from mnist_dist.errors import ConfigError, Interrupted, MnistDistError
from mnist_dist.flags import spelled_as_typed
from mnist_dist.urls import shown_in

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # A log file gets a progress line at most this often.
LOG_COLUMNS = 160  # A table in a log file is this wide.
_NATIVE_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,.]+ [DIWE] \d+ \d+\] [\w/]+\.cc:\d+: ")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2  # The file descriptor, which native code writes to directly.
EXIT_S = 60.0  # At exit, the functions that packages registered get at most this long.
FILTER_S = 2.0  # At exit, the stderr filter gets at most this long to pass on what is still in its pipe.
QUIET_S = 0.2  # It stops earlier if the pipe is empty after this long: a child process may keep it open for ever.


class Console:
    """Everything a user sees of a job, on stderr.

    Args:
        verbose: show the output of Ray and TensorFlow, and tracebacks.
        terminal: whether progress bars can be drawn; None: detect it from stderr.
        silent: show nothing.
        embedded: the job runs in the user's own Python process, which a second signal must not end.
    """

    def __init__(
        self, *, verbose: bool = False, terminal: bool | None = None, silent: bool = False, embedded: bool = False
    ) -> None:
        self.verbose, self.silent, self.embedded = verbose, silent, embedded
        self._rich = RichConsole(
            file=cast(IO[str], _Stderr()),
            force_terminal=terminal,
            highlight=False,
            emoji=False,
            soft_wrap=True,
            quiet=silent,
        )

    @property
    def terminal(self) -> bool:
        return self._rich.is_terminal

    def line(self, text: str) -> None:
        """Prints a line without interpreting markup, and without the secrets of URLs."""
        self._rich.print(shown_in(text), markup=False)

    @contextmanager
    def progress(self, title: str) -> "Iterator[Bar]":
        """Shows a progress bar on a terminal, or a line every few seconds in a log."""
        if not self.terminal:
            yield _LineBar(self, title)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[note]}"))
        with Progress(*columns, _TimeLeft(), console=self._rich, transient=True) as progress:
            yield _RichBar(progress, title)

    @contextmanager
    def view(self, title: str) -> "Iterator[View]":
        """Shows a table on a terminal, refreshed in place, or a line every few seconds in a log."""
        if not self.terminal:
            yield View(self, None, title)
            return
        with Live(console=self._rich, transient=True, auto_refresh=False) as live:
            yield View(self, live, title)

    def table(self, rows: "Sequence[Sequence[str]]") -> None:
        """Prints rows of cells; the first row holds the column titles."""
        width = None if self.terminal else LOG_COLUMNS
        wide = RichConsole(file=cast(IO[str], _Stderr()), width=width, highlight=False, emoji=False, quiet=self.silent)
        wide.print(make_table(rows))


class _Stderr:
    """Python's stderr of the moment. A job goes on after it is closed or nobody reads it any more (`2>&1 | head`)."""

    @property
    def _file(self) -> Any:
        """A progress bar of rich puts a proxy in the place of stderr, which would write to the console that writes
        here."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._file.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._file.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return int(self._file.fileno())

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"


class Bar:
    """A progress bar."""

    def update(self, *, done: float, total: float, note: str = "") -> None:
        """Shows that `done` of `total` is done, with a note."""
        raise NotImplementedError


class _RichBar(Bar):
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, note="")

    def update(self, *, done: float, total: float, note: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=note)


class _TimeLeft(ProgressColumn):
    """The forecast of a bar whose note has none."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds, note = task.time_remaining, task.fields["note"]
        return Text("" if not seconds or "left" in note else time_left(seconds))


class _LineBar(Bar):
    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title, self._last = console, title, time.monotonic()

    def update(self, *, done: float, total: float, note: str = "") -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._console.line(f"{self._title}: {100 * done / max(total, 1):.0f} % {note}".rstrip())


class View:
    """A table that is redrawn in place on a terminal; a log gets its summary every few seconds."""

    def __init__(self, console: Console, live: Live | None, title: str) -> None:
        self._console, self._live, self._title, self._last = console, live, title, time.monotonic()

    def update(self, *, summary: str, rows: Sequence[Sequence[str]]) -> None:
        """Shows a summary, and below it rows of cells; the first row holds the column titles."""
        if self._live is None:
            if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                self._console.line(f"{self._title}: {summary}")
            return
        self._live.update(make_table(rows, title=f"{self._title}: {summary}"), refresh=True)


def make_table(rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """Returns a table without borders; the first row holds the column titles."""
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    return table


def time_left(seconds: float) -> str:
    """Formats a forecast for display: `8 s left`, `3.5 min left`; never less than a second."""
    return f"{max(round(seconds), 1)} s left" if seconds < 120 else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Formats a duration for display: `0.4 s`, `42 s`, `3.5 min`, `2.1 h`."""
    if seconds < 120:
        return f"{seconds:,.{0 if seconds >= 10 else 1}f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


class Stop:
    """Records SIGINT and SIGTERM while it is entered; a second signal ends the process at once.

    Outside the main thread it records nothing, because Python delivers signals only to the main thread.

    Attributes:
        signal_number: the first signal received, or None.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take_signals()
        return self

    def take_signals(self) -> None:
        """Installs the signal handlers again after something else (such as `ray.init`) replaced them."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived; for work that can stop at any point."""
        if self.signal_number is not None:
            again = (
                "call it again to resume"
                if self._console.embedded
                else f"run the same command to resume: {command_line()}"
            )
            raise Interrupted(self.signal_number, f"Stopped. All that was finished is saved; {again}")

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is not None:
            if self._console.embedded:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.signal_number = number
        if self._console.silent:
            return
        # `line` is not safe here: the main thread may be inside it, and Python's file objects are not reentrant.
        begin = "\r\x1b[2K" if self._console.terminal else ""
        line = f"{begin}{signal.Signals(number).name}: saving progress; a second signal ends the process at once\n"
        os.write(STDERR, line.encode())


def run(main: Callable[[], Mapping[str, Any]], *, job: str, fields: Container[str] = ()) -> NoReturn:
    """Runs a job, prints its JSON as the last line on stdout and ends the process with its exit code.

    Args:
        main: parses the command line, does the work and returns the keys of the JSON line.
        job: the job's name, the value of `job` in the JSON.
        fields: names of the settings that messages show as flags.
    """
    _open_streams()
    verbose = "--verbose" in sys.argv
    console = Console(verbose=verbose)
    try:
        result, code = dict(main()), 0
    except MnistDistError as error:
        result, code = _failure(error), error.exit_code
    except KeyboardInterrupt as error:
        result, code = _failure(error), 130
    except SystemExit as end:
        cause = _error_of_exit(end)
        result, code = _failure(cause), cause.exit_code
    except Exception as error:  # The last resort of a job: an exit code instead of a traceback.
        result, code = _failure(error), 1
        console.line(traceback.format_exc() if verbose else "unexpected error; --verbose shows the traceback")
    if "error" in result:
        if code == ConfigError.exit_code:
            result["error"] = spelled_as_typed(result["error"], fields)
        console.line(f"error: {result['error']}")
    answer(shown_in(json.dumps({"job": job, **result})))
    _leave(code)


def answer(text: str) -> None:
    """Prints text on stdout, unless that is closed or nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def _open_streams() -> None:
    """Opens what the caller has closed (`>&-`), so that no other file becomes stdout or stderr."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it stays open as long as the process runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - the same


def _error_of_exit(end: SystemExit) -> MnistDistError:
    """The error that made a package exit; after `--help` the process ends."""
    if end.code != 1:
        _leave(int(end.code or 0))
    # Ray's own SIGTERM handler exits with 1; it is active from `ray.init` until `Stop` installs its handlers again.
    message = f"Stopped while Ray was starting; run the same command to resume: {command_line()}"
    return Interrupted(signal.SIGTERM, message)


def _leave(code: int) -> NoReturn:
    """Ends the process without unloading Ray and TensorFlow, which would take half a second, and within `EXIT_S`: the
    exit functions of others may wait for a server that is gone."""
    deadline = threading.Timer(EXIT_S, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
    atexit._run_exitfuncs()  # They delete local copies of bundles and shut down a Ray that still runs.
    for thread in threading.enumerate():
        if isinstance(thread, _Filter):
            thread.end()
    os._exit(code)


def _failure(error: BaseException) -> dict[str, Any]:
    name = type(error).__name__
    message = str(error) if isinstance(error, MnistDistError) else f"{name}: {error}"
    return {**getattr(error, "result", {}), "error": message, "error_type": name}


def command_line() -> str:
    """The command line of this process, as a user would type it again; secrets of URLs are left out."""
    main, python = sys.modules["__main__"].__spec__, os.path.basename(sys.executable)
    if main is not None:
        program = [python, "-m", main.name.removesuffix(".__main__")]
    elif sys.argv[0].endswith(".py"):
        program = [python, sys.argv[0]]
    else:  # An installed command.
        program = [os.path.basename(sys.argv[0])]
    return shlex.join([*program, *map(shown_in, sys.argv[1:])])


def quiet(*, verbose: bool) -> None:
    """Silences Ray, TensorFlow and oneDNN in this process and its children; call it before they are imported."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_LogFormat("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[to_stderr])
    logging.getLogger("mnist_dist").setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        return
    _quiet_packages()
    warnings.filterwarnings("ignore")
    lines = _Filter()
    sys.stderr = os.fdopen(lines.original, "w", buffering=1, errors="backslashreplace")
    lines.start()


class _LogFormat(logging.Formatter):
    """Leaves out the secrets of URLs, also those in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_in(super().format(record))


class _Quieted:
    """Like `quiet`, for a block in the user's own process: stderr and warnings are restored afterwards.

    Blocks may overlap, in several threads; the last one to end restores everything.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._undo = contextlib.ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._depth == 0:
                self._begin()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._undo.close()

    def _begin(self) -> None:
        _quiet_packages()
        self._undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        lines = _Filter()
        if _is_stderr(sys.stderr):  # What Python itself writes need not pass the filter, and may go to a terminal.
            file = os.fdopen(os.dup(lines.original), "w", buffering=1, errors="backslashreplace")
            self._undo.callback(file.close)
            self._undo.enter_context(contextlib.redirect_stderr(file))
        lines.start()
        self._undo.callback(lines.end, close=True)


quieted = _Quieted()


def _is_stderr(file: Any) -> bool:
    try:
        return bool(file.fileno() == STDERR)
    except (AttributeError, OSError, ValueError):  # A notebook's stderr has no file descriptor.
        return False


def _quiet_packages() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # Ray Data's helper actors raise when they are stopped.
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray Tune prints nothing at verbose=0 only with its old output.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The search itself reports failed trials.


class _Filter(threading.Thread):
    """Passes on what is written to file descriptor 2, except non-fatal log lines of Ray's C++ core.

    Ray's own settings would drop its log files, too.

    Attributes:
        original: a duplicate of file descriptor 2 as it was before.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="stderr")
        self.original, (self._read_end, self._write_end) = os.dup(STDERR), os.pipe()

    def start(self) -> None:
        os.dup2(self._write_end, STDERR)
        os.close(self._write_end)
        super().start()

    def run(self) -> None:
        with open(self._read_end, "rb", closefd=False) as lines:
            for line in lines:
                if not _NATIVE_LINE.match(line):
                    with contextlib.suppress(OSError):  # Nobody reads it any more; what writes must not block.
                        os.write(self.original, line)

    def end(self, *, close: bool = False) -> None:
        """Restores file descriptor 2 once everything that was written to it is passed on.

        Args:
            close: also closes the file descriptors of the filter.
        """
        os.dup2(self.original, STDERR)  # Closes the write end of the pipe, unless a child process holds it, too.
        deadline = time.monotonic() + FILTER_S
        self.join(QUIET_S)
        while self.is_alive() and time.monotonic() < deadline and select.select([self._read_end], [], [], 0)[0]:
            self.join(QUIET_S)
        if close and not self.is_alive():  # Otherwise a child process still writes to the pipe, and is passed on.
            os.close(self._read_end)
            os.close(self.original)
