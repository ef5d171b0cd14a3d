"""The lock: one holder with a number of its own, taken over from the dead and the silent, never from the living."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import Recorder, Watched

from mnist_dist import documents
from mnist_dist.console import Stop
from mnist_dist.errors import Interrupted, Locked, LockLost
from mnist_dist.store.anywhere import ANYWHERE, Anywhere
from mnist_dist.store.base import Store
from mnist_dist.store.lock import Holder, Lock, _host, holder_of
from mnist_dist.store.memory import MemoryStore

EPOCH_S = 1_700_000_000.0


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return f"{folder}/work/lock"


@pytest.fixture
def always_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every driver makes something under its number, so that even the first leaves its number."""
    made = Lock.__init__

    def init(lock: Lock, *arguments: Any, **fields: Any) -> None:
        made(lock, *arguments, **{"above": lambda: 0, **fields})
        lock._above = lambda: lock.number

    monkeypatch.setattr(Lock, "__init__", init)


class Clock:
    """Stands in for `time` in the lock: whoever sleeps gets there at once, and something may happen at some second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._plans: list[tuple[float, Callable[[], object]]] = []

    def at(self, second: float, happens: Callable[[], object]) -> None:
        self._plans.append((second, happens))

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return EPOCH_S + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        due = [happens for second, happens in self._plans if second <= self.now_s]
        self._plans = [plan for plan in self._plans if plan[0] > self.now_s]
        for happens in due:
            happens()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mnist_dist.store.lock.time", clock)
    return clock


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.store.lock.SECONDS_BETWEEN_BEATS", 0.01)


def other(*, host: str = "elsewhere", pid: int = 1, at: float = EPOCH_S, released: bool = False) -> bytes:
    return documents.encode(Holder(id="other", host=host, pid=pid, time=at, released=released))


def leave(uri: str, name: str = "000001", content: bytes | None = None) -> None:
    """As another driver would; by default one of another host, which may have died there."""
    ANYWHERE.write_bytes(f"{uri}/{name}", other() if content is None else content)


def names(uri: str, store: Store = ANYWHERE) -> list[str]:
    return [entry.uri.removeprefix(f"{uri}/") for entry in store.list_entries(uri)]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def take(uri: str, **fields: Any) -> Lock:
    return Lock(uri, what="the run", **fields).__enter__()


def wait_for(happened: Callable[[], object]) -> None:
    while not happened():
        time.sleep(0.005)


# --- holding and leaving ---------------------------------------------------------------------------------------------


def test_a_held_lock_is_refused(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        with pytest.raises(Locked, match=f"working on the run: process {os.getpid()} on"):
            take(uri)
        lock.check()
        lock.fence.check()
        assert (lock.number, lock.fence.number, lock.lost, names(uri)) == (1, 1, False, ["000001"])


def test_a_first_driver_that_made_nothing_leaves_nothing(uri: str) -> None:
    with Lock(uri, what="the run"):
        pass
    assert not ANYWHERE.exists(f"{uri}/000001")
    assert names(uri) == []
    assert holder_of(uri) is None


@pytest.mark.usefixtures("always_made")
def test_numbers_grow_and_only_the_highest_stays(uri: str) -> None:
    for number in (1, 2, 3):
        with Lock(uri, what="the run") as lock:
            assert lock.number == number
            assert names(uri) == [f"{number:06d}"]
            lock.check()
        assert names(uri) == [f"{number:06d}", f"{number:06d}.beat"]
        assert holder_of(uri) is None


def test_whatever_has_a_lower_number_is_deleted_by_the_next_holder(uri: str) -> None:
    for name in ("000003", "000007", "000007.beat", "000005.beat", ".000006.beat.0a1b.tmp"):
        leave(uri, name, other(released=True))
    leave(uri, "notes")
    with Lock(uri, what="the run") as lock:
        assert lock.number == 8
        assert names(uri) == ["000008", "notes"]


def test_numbers_are_compared_as_numbers(uri: str) -> None:
    for name in ("999999", "1000000"):
        leave(uri, name, other(released=True))
    with Lock(uri, what="the run") as lock:
        assert lock.number == 1_000_001


def test_a_lock_without_objects_begins_above_what_was_made(uri: str) -> None:
    with Lock(uri, what="the run", above=lambda: 16) as lock:
        assert lock.number == 17
    assert names(uri) == ["000017", "000017.beat"]


@pytest.mark.parametrize(("made", "number"), [(2, 4), (9, 10)])
def test_a_number_is_above_those_of_earlier_drivers_and_of_what_was_made(uri: str, made: int, number: int) -> None:
    leave(uri, "000003", other(released=True))  # in a copy of an output, a lock may be older than what it protects
    with Lock(uri, what="the run", above=lambda: made) as lock:
        assert lock.number == number


@pytest.mark.usefixtures("quick_beats")
def test_a_holder_renews_its_beat_and_says_when_it_leaves(uri: str) -> None:
    leave(uri, "000004", other(released=True))
    with Lock(uri, what="the run"):
        wait_for(lambda: "000005.beat" in names(uri))
        first = holder_of(uri)
        assert first is not None
        assert (first.pid, first.host, first.seems_alive) == (os.getpid(), _host(), True)
        wait_for(lambda: (found := holder_of(uri)) is not None and found.time > first.time)
    assert holder_of(uri) is None
    assert names(uri) == ["000005", "000005.beat"]
    with Lock(uri, what="the run") as lock:  # although the process that left it is alive
        assert lock.number == 6


@pytest.mark.usefixtures("quick_beats")
def test_one_who_comes_while_a_lock_is_left_is_not_taken_for_the_one_who_leaves(uri: str) -> None:
    taken: list[Lock] = []

    def come(change: str) -> None:
        if change.startswith("delete") and not taken:
            try:
                taken.append(take(uri))
            except (Locked, LockLost):
                return
            taken[0].check()

    with Lock(uri, what="the run", store=Watched(come)):
        wait_for(lambda: "000001.beat" in names(uri))
    taken = taken or [take(uri)]
    taken[0].check()
    taken[0].__exit__()
    assert names(uri) == []


# --- taking over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["000001", "000001.beat"])
def test_a_dead_process_of_this_host_loses_it_at_once(uri: str, name: str) -> None:
    leave(uri)
    leave(uri, name, other(host=_host(), pid=dead_process(), at=time.time() + 3600))
    with Lock(uri, what="the run") as lock:
        lock.check()
        assert (lock.number, names(uri)) == (2, ["000002"])


@pytest.mark.parametrize("age_s", [-3600, 0, 3600])
def test_without_a_wait_a_silent_driver_of_another_host_is_left_alone(uri: str, age_s: float) -> None:
    leave(uri, content=other(at=time.time() - age_s))
    with pytest.raises(Locked, match=rf"process 1 on elsewhere, last seen -?{abs(age_s)}"):
        take(uri)
    assert names(uri) == ["000001"]


@pytest.mark.parametrize("age_s", [-1e6, 0, 1e6])
@pytest.mark.parametrize("name", ["000001", "000001.beat"])
def test_another_host_loses_it_after_a_minute_of_silence_by_the_clock_of_the_one_who_waits(
    uri: str, clock: Clock, name: str, age_s: float
) -> None:
    leave(uri)
    leave(uri, name, other(at=EPOCH_S - age_s))
    still_held = []
    clock.at(59, lambda: still_held.append(names(uri)))
    console = Recorder()
    with Lock(uri, what="the run", wait_s=90, console=console) as lock:
        lock.check()
        assert (lock.number, names(uri)) == (2, ["000002"])
    assert 60 <= clock.now_s < 63
    assert len(still_held) == 1
    assert "000002" not in still_held[0]
    assert len(console.lines) == 1
    assert "Waiting up to 90 s for the lock of the run, held by process 1 on elsewhere" in console.lines[0]


def test_a_process_of_this_host_that_is_alive_but_silent_loses_it_after_a_minute_too(uri: str, clock: Clock) -> None:
    leave(uri, content=other(host=_host(), pid=os.getpid()))
    with Lock(uri, what="the run", wait_s=90) as lock:
        lock.check()
    assert clock.now_s >= 60


@pytest.mark.parametrize("second", [1, 30, 60])
def test_one_who_waits_is_refused_once_the_holder_renews_its_beat(uri: str, clock: Clock, second: float) -> None:
    leave(uri)
    clock.at(second, lambda: leave(uri, "000001.beat", other(at=EPOCH_S + second)))
    with pytest.raises(Locked, match="working on the run: process 1 on elsewhere, last seen"):
        take(uri, wait_s=90)
    assert clock.now_s == second
    assert names(uri) == ["000001", "000001.beat"]


def test_a_beat_counts_although_the_one_who_waits_slept_through_it(uri: str, clock: Clock) -> None:
    def sleep_long() -> None:
        leave(uri, "000001.beat", other(at=EPOCH_S + 55))
        clock.sleep(65)

    leave(uri)
    with pytest.raises(Locked, match="working on the run"):
        take(uri, wait_s=90, console=Recorder(at="Waiting", then=sleep_long))
    assert names(uri) == ["000001", "000001.beat"]


def test_one_who_waits_gets_a_lock_that_is_released(uri: str, clock: Clock) -> None:
    leave(uri)
    clock.at(5, lambda: leave(uri, "000001.beat", other(released=True)))
    with Lock(uri, what="the run", wait_s=90) as lock:
        assert lock.number == 2
    assert clock.now_s == 5


def test_one_who_waits_gets_a_lock_of_which_nothing_is_left(uri: str, clock: Clock) -> None:
    leave(uri)
    clock.at(5, lambda: ANYWHERE.delete_tree(uri))
    with Lock(uri, what="the run", wait_s=90, above=lambda: 7) as lock:
        assert lock.number == 8
    assert clock.now_s == 5


def test_one_who_waited_in_vain_is_refused(uri: str, clock: Clock) -> None:
    leave(uri)
    with pytest.raises(Locked, match="working on the run"):
        take(uri, wait_s=30)
    assert clock.now_s == 30
    assert names(uri) == ["000001"]


def test_a_signal_ends_the_waiting(uri: str, clock: Clock) -> None:
    leave(uri)
    stop = Stop(Recorder())
    clock.at(5, lambda: setattr(stop, "signal_number", signal.SIGTERM))
    with pytest.raises(Interrupted, match="same command"):
        take(uri, wait_s=90, stop=stop)
    assert clock.now_s == 5
    assert names(uri) == ["000001"]


def test_a_lock_that_was_never_written_to_its_end_is_taken_over_after_a_minute(uri: str, clock: Clock) -> None:
    leave(uri, content=b"")  # as a killed driver leaves it on a file system without hard links
    with pytest.raises(Locked, match="working on the run"):
        take(uri)
    with Lock(uri, what="the run", wait_s=90) as lock:
        lock.check()
    assert clock.now_s >= 60


# --- races -----------------------------------------------------------------------------------------------------------


class Bucket(MemoryStore):
    """Objects that go while they are listed are no error, as of a bucket."""

    def scan_entries(self, uri: str) -> Any:
        while True:
            try:
                return iter(list(super().scan_entries(uri)))
            except FileNotFoundError:
                continue


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.usefixtures("always_made")
def test_of_many_who_race_for_a_lock_that_was_left_exactly_one_wins(tmp_path: Path, place: str) -> None:
    folder = str(tmp_path) if place == "local" else "memory://bucket/race"
    store, dead, racers, numbers = Anywhere({**ANYWHERE.stores, "memory": Bucket()}), dead_process(), 4, list[int]()

    def race(uri: str, start: threading.Barrier) -> Lock | None:
        lock = Lock(uri, what="the run", store=store)
        start.wait()
        try:
            return lock.__enter__()
        except (Locked, LockLost):
            return None

    with ThreadPoolExecutor(racers) as pool:
        for number in range(100):
            uri = f"{folder}/{number}/lock"
            if number % 3:  # in two of three rounds there is somebody to take it over from
                left = other(host=_host(), pid=dead, released=number % 3 == 1)
                store.create_bytes(f"{uri}/{number:06d}", left)
            start = threading.Barrier(racers)
            entered = [lock for lock in pool.map(race, [uri] * racers, [start] * racers) if lock is not None]
            assert len(entered) == 1
            entered[0].check()
            assert names(uri, store) == [f"{entered[0].number:06d}"]
            numbers.append(entered[0].number)
            entered[0].__exit__()
    assert numbers == [number + 1 if number % 3 else 1 for number in range(100)]


@pytest.mark.usefixtures("always_made")
def test_holders_that_follow_each_other_never_hold_it_together(tmp_path: Path) -> None:
    uri, inside, numbers = str(tmp_path / "lock"), threading.Lock(), list[int]()

    def work(_: int) -> None:
        while True:
            try:
                with Lock(uri, what="the run") as lock:
                    assert inside.acquire(blocking=False)
                    lock.check()
                    numbers.append(lock.number)
                    inside.release()
                    return
            except (Locked, LockLost):
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(60)))
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 60


@pytest.mark.parametrize("next_one_leaves", [True, False])
def test_one_who_was_slow_does_not_hold_a_number_that_others_had_in_the_meantime(
    uri: str, next_one_leaves: bool
) -> None:
    held: list[Lock] = []

    def others_come_and_go(change: str) -> None:
        if change == "create 000006":
            take(uri).__exit__()
            held.append(take(uri))
            if next_one_leaves:
                held[0].__exit__()

    leave(uri, "000005", other(released=True))
    slow = Lock(uri, what="the run", store=Watched(others_come_and_go))
    if next_one_leaves:
        with slow:
            assert (slow.number, names(uri)) == (8, ["000008"])
            slow.check()
    else:
        with pytest.raises(Locked, match="working on the run"):
            slow.__enter__()
        assert names(uri) == ["000007"]
        held[0].check()
        held[0].__exit__()


def test_a_holder_that_goes_just_before_it_is_looked_at_is_no_error(tmp_path: Path) -> None:
    uri = str(tmp_path / "lock")

    class Vanishing(Anywhere):
        def read_bytes(self, uri: str) -> bytes:
            self.delete_tree(uri.rpartition("/")[0])
            return super().read_bytes(uri)

    leave(uri)
    with Lock(uri, what="the run", store=Vanishing(ANYWHERE.stores), above=lambda: 4):
        assert names(uri) == ["000005"]
        assert holder_of(uri, store=Vanishing(ANYWHERE.stores)) is None


class Forgetful(Anywhere):
    """The answer to each put is lost, and the store refuses its repetition because the first one came through."""

    def create_bytes(self, uri: str, data: bytes) -> bool:
        super().create_bytes(uri, data)
        return super().create_bytes(uri, data)


def test_a_put_whose_answer_was_lost_is_known_again(uri: str) -> None:
    leave(uri, "000004", other(released=True))
    with Lock(uri, what="the run", store=Forgetful(ANYWHERE.stores)) as lock:
        lock.check()
        lock.fence.check()
        assert lock.number == 5
        with pytest.raises(Locked, match="working on the run"):
            take(uri)
    with Lock(uri, what="the run") as after:
        assert after.number == 6


# --- losing it -------------------------------------------------------------------------------------------------------


def check_lost(lock: Lock) -> None:
    with pytest.raises(LockLost, match="another driver has taken over the run"):
        lock.check()


def check_fenced_off(lock: Lock) -> None:
    with pytest.raises(LockLost, match="another driver has taken over, so this worker stops"):
        lock.fence.check()


def test_a_driver_that_comes_late_is_told_and_leaves_the_next_one_alone(uri: str, clock: Clock) -> None:
    late = take(uri)
    with Lock(uri, what="the run", wait_s=90) as lock:
        assert (late.number, lock.number) == (1, 2)
        check_lost(late)
        check_fenced_off(late)
        late.__exit__()
        assert names(uri) == ["000002"]
        lock.check()
        lock.fence.check()


def test_a_worker_in_another_process_has_the_same_fence(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        fence = pickle.loads(pickle.dumps(lock.fence))
        assert fence == lock.fence
        fence.check()
        leave(uri, "000002")
        with pytest.raises(LockLost, match=f"Received: {uri}, 1$"):
            fence.check()


@pytest.mark.usefixtures("clock")
def test_a_beat_that_comes_late_changes_nothing(uri: str) -> None:
    late = take(uri)
    with Lock(uri, what="the run", wait_s=90) as lock:
        late._objects.renew(late.number, late._now())  # it was suspended just before
        check_lost(late)
        lock.check()
        holder = holder_of(uri)
        assert holder is not None
        assert holder.id == lock._owner.id
        late.__exit__()
    assert names(uri) == ["000001.beat", "000002", "000002.beat"]
    with Lock(uri, what="the run"):
        assert names(uri) == ["000003"]


@pytest.mark.usefixtures("quick_beats")
def test_the_thread_of_a_lock_finds_out_that_it_is_lost(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        wait_for(lambda: "000001.beat" in names(uri))
        assert not lock.lost
        leave(uri, "000002")
        wait_for(lambda: lock.lost)
        check_lost(lock)
    assert holder_of(uri) is not None


def test_a_lock_whose_folder_was_deleted_is_lost(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        ANYWHERE.delete_tree(uri)
        check_lost(lock)
        check_fenced_off(lock)
        with Lock(uri, what="the run") as same_number:
            assert same_number.number == lock.number
            check_lost(lock)
            same_number.check()
    assert names(uri) == []


@pytest.mark.usefixtures("quick_beats")
def test_a_store_that_fails_for_a_while_does_not_lose_the_lock(tmp_path: Path) -> None:
    uri, failures = str(tmp_path / "lock"), list[str]()

    def fail(change: str) -> None:
        if change.startswith("write"):
            failures.append(change)
            if len(failures) < 3:
                raise PermissionError(13, "not now")

    class Failing(Anywhere):
        def write_bytes(self, uri: str, data: bytes) -> None:
            fail("write")
            super().write_bytes(uri, data)

    with Lock(uri, what="the run", store=Failing(ANYWHERE.stores)) as lock:
        wait_for(lambda: "000001.beat" in names(uri))
        lock.check()
        assert not lock.lost
