"""the budget of a search: what its drivers spent counts, and what its finalists will need."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.store.lock import Lock
from mnist_dist.tuning.budget import FINALIST_START_S, SpentTime, choose_finalists, finalists_s
from mnist_dist.tuning.space import TypicalDraw, propose
from mnist_dist.tuning.trials import Trial

JOB = SearchJob(
    space=SearchSpace(
        backbones=(
            BackboneSpace(backbone="mlp", trained=("all",)),
            BackboneSpace(backbone="mobilenet", alpha=(0.25,), trained=("fine-tune",)),
        )
    ),
    search=SearchConfig(trial_epochs=10, finalist_epochs=40, fine_tune_epochs=3, finalists=2),
)


def record(folder: Path, name: str, seconds: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"seconds": seconds}))


def test_the_time_of_earlier_drivers_counts_but_not_that_of_another_search(tmp_path: Path) -> None:
    for number, seconds in ((2, 1000.0), (3, 20.0), (5, 7.5)):
        record(tmp_path / "run", f"spent-{number:06d}.json", seconds)
    record(tmp_path / "run", "spent-000004.json.tmp", 300.0)
    with Lock(str(tmp_path / "run" / "lock"), what="the run", above=lambda: 5) as lock:
        spent = SpentTime(uri=str(tmp_path / "run"), fence=lock.fence)
        assert spent.earlier_s(since=3) == 27.5
        spent.write(11.0)
        assert spent.earlier_s(since=3) == 27.5
    with Lock(str(tmp_path / "run" / "lock"), what="the run") as lock:
        assert SpentTime(uri=str(tmp_path / "run"), fence=lock.fence).earlier_s(since=3) == 38.5


def test_a_driver_that_lost_its_lock_records_nothing(tmp_path: Path) -> None:
    with Lock(str(tmp_path / "lock"), what="the run") as lock:
        spent = SpentTime(uri=str(tmp_path), fence=lock.fence)
        (tmp_path / "lock" / f"{lock.number + 1:06d}").write_text("{}")
        spent.write(11.0)
        assert not list(tmp_path.glob("spent-*"))
        (tmp_path / "lock" / f"{lock.number + 1:06d}").unlink()


def test_time_is_recorded_while_a_driver_works_and_when_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "spent-000001.json"
    with Lock(str(tmp_path / "lock"), what="the run") as lock:
        spent = SpentTime(uri=str(tmp_path), fence=lock.fence)
        with spent.counting(began=-1e6, every_s=0.001):
            while not file.exists():
                threading.Event().wait(0.001)
        file.unlink()
        with spent.counting(began=-1e6):
            assert not file.exists()
        assert json.loads(file.read_bytes())["seconds"] > 1e6


def trial(number: int, backbone: str, accuracy: float, **fields: Any) -> Trial:
    values: dict[str, Any] = {"status": "done", "epochs": 5, "seconds": 10.0, **fields}
    return Trial(number=number, params=propose(JOB, TypicalDraw(backbone)), val_accuracy=accuracy, **values)


def forecast(*trials: Trial, at_once: int = 1, fine_tune_epoch_s: float = 0.0, finalists: int = 2) -> float:
    job = replace(JOB, search=replace(JOB.search, finalists=finalists))
    return finalists_s(trials, job, at_once=at_once, fine_tune_epoch_s=lambda trial: fine_tune_epoch_s)


def test_finalists_are_forecast_from_the_seconds_per_epoch_of_the_best_trials() -> None:
    best, second, worst = trial(0, "mlp", 0.9), trial(1, "mlp", 0.8, seconds=5.0), trial(2, "mlp", 0.1, seconds=1e6)
    assert forecast() == 0.0
    assert forecast(trial(0, "mlp", 0.5, status="failed")) == 0.0
    assert forecast(worst, best, finalists=1) == FINALIST_START_S + 40 * 2.0
    assert forecast(worst, second, best) == 2 * FINALIST_START_S + 40 * (2.0 + 1.0)
    assert forecast(worst, second, best, at_once=2) == FINALIST_START_S + 40 * 2.0


def test_with_hours_as_many_finalists_are_chosen_as_fit_into_a_quarter_of_them() -> None:
    trials = [trial(0, "mlp", 0.9), trial(1, "mlp", 0.8), trial(2, "mlp", 0.7)]  # each takes 80 s and its start

    def chosen(hours: float | None, *, at_once: int = 1) -> list[int]:
        job = replace(JOB, search=replace(JOB.search, finalists=2, hours=hours))
        best = choose_finalists(trials, job, at_once=at_once, fine_tune_epoch_s=lambda trial: 0.0)
        return [each.number for each in best]

    two_s = 2 * (FINALIST_START_S + 80)
    assert chosen(None) == [0, 1]
    assert chosen(4.01 * two_s / 3600) == [0, 1]
    assert chosen(3.99 * two_s / 3600) == [0]
    assert chosen(3.99 * two_s / 3600, at_once=2) == [0, 1]
    assert chosen(0.001) == [0]


def test_fine_tuning_is_forecast_on_top_of_the_epochs_of_the_head() -> None:
    head = trial(0, "mobilenet", 0.9)
    assert forecast(head) == FINALIST_START_S + 10 * 2.0
    assert forecast(head, fine_tune_epoch_s=60.0) == FINALIST_START_S + 10 * 2.0 + 3 * 60.0
