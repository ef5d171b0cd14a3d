"""callbacks: that Keras' own go on where they were interrupted, though they have no state to ask for."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import pytest
from harness import an_epoch

from mnist_dist.config import FitConfig
from mnist_dist.models.history import history_csv
from mnist_dist.training.callbacks import REMEMBERED, LogFiles, callback_states, make_callbacks, restore_callbacks

CONFIG = FitConfig(early_stopping_patience=4, plateau_patience=2, plateau_factor=0.25)
# Better, worse, a little better (below ReduceLROnPlateau's least change), and four times worse in the end.
LOSSES = [0.9, 0.7, 0.8, 0.75, 0.5, 0.49995, 0.6, 0.4, 0.41, 0.45, 0.42, 0.43, 0.3]

HEADER = "epoch,phase,loss,accuracy,val_loss,val_accuracy,learning_rate"


class Phase:
    """Callbacks around a network that is never trained; its validation losses are given."""

    def __init__(self) -> None:
        self.model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        self.model.optimizer = keras.optimizers.SGD(1.0)
        self.model.stop_training = False
        self.callbacks = make_callbacks(CONFIG, files=None, history=[])
        self.all = keras.callbacks.CallbackList(self.callbacks, model=self.model)
        self.all.on_train_begin()

    @property
    def rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def epochs(self, numbers: range) -> list[tuple[float, bool]]:
        """Learning rate and the wish to stop after each of these epochs."""
        seen = []
        for number in numbers:
            self.all.on_epoch_end(number, {"val_loss": LOSSES[number], "loss": 0.1})
            seen.append((self.rate, bool(self.model.stop_training)))
        return seen

    def memory(self) -> dict[str, dict[str, Any]]:
        """All attributes of the callbacks, but the model."""
        return {
            type(callback).__name__: {key: value for key, value in vars(callback).items() if key != "_model"}
            for callback in self.callbacks
        }


@pytest.fixture(scope="module")
def undisturbed() -> list[tuple[float, bool]]:
    return Phase().epochs(range(len(LOSSES)))


def test_the_losses_make_both_callbacks_act(undisturbed: list[tuple[float, bool]]) -> None:
    rates, stops = zip(*undisturbed, strict=True)
    assert rates[:4] == (1.0, 1.0, 1.0, 0.25)
    assert rates[6] == rates[5] / 4
    assert [number for number, stop in enumerate(stops) if stop] == [11, 12]


@pytest.mark.parametrize("cut", range(1, len(LOSSES)))
def test_interrupted_callbacks_behave_like_undisturbed_ones(undisturbed: list[tuple[float, bool]], cut: int) -> None:
    first, second = Phase(), Phase()
    before = first.epochs(range(cut))
    states = json.loads(json.dumps(callback_states(first.callbacks)))
    restore_callbacks(second.callbacks, states)
    second.model.optimizer.learning_rate = first.rate
    second.model.stop_training = first.model.stop_training
    assert before + second.epochs(range(cut, len(LOSSES))) == undisturbed
    assert callback_states(second.callbacks) == callback_states(unbroken(len(LOSSES)).callbacks)


def unbroken(epochs: int) -> Phase:
    phase = Phase()
    phase.epochs(range(epochs))
    return phase


def test_everything_that_the_callbacks_change_is_remembered() -> None:
    phase = Phase()
    at_start = phase.memory()
    changed: dict[str, set[str]] = {name: set() for name in at_start}
    for number in range(len(LOSSES)):
        phase.epochs(range(number, number + 1))
        for name, memory in phase.memory().items():
            changed[name] |= {key for key, value in memory.items() if value != at_start[name].get(key, "absent")}
    for name, keys in changed.items():
        keys -= {"monitor_op", "min_delta"}  # set at the first epoch, from the metric's name alone
        assert keys <= set(REMEMBERED[name])


@pytest.mark.parametrize("name", list(REMEMBERED))
def test_what_is_remembered_is_there_in_this_keras(name: str) -> None:
    callback = getattr(keras.callbacks, name)()
    callback.on_train_begin()
    for key in REMEMBERED[name]:
        assert hasattr(callback, key), key


def test_the_states_are_plain_values_by_class_name() -> None:
    states = callback_states(unbroken(3).callbacks)
    assert states == {
        "EarlyStopping": {"wait": 1, "stopped_epoch": 0, "best": 0.7, "best_epoch": 1},
        "ReduceLROnPlateau": {"wait": 1, "cooldown_counter": 0, "best": 0.7},
    }
    assert {type(value) for memory in states.values() for value in memory.values()} == {int, float}


def test_callbacks_are_there_only_where_they_are_asked_for(tmp_path: Path) -> None:
    def names(config: FitConfig, files: LogFiles | None = None) -> list[str]:
        return [type(callback).__name__ for callback in make_callbacks(config, files=files, history=[])]

    assert names(FitConfig()) == []
    assert names(FitConfig(early_stopping_patience=3)) == ["EarlyStopping"]
    assert names(FitConfig(plateau_patience=3)) == ["ReduceLROnPlateau"]
    history = LogFiles(history=str(tmp_path / "history.csv"))
    assert names(FitConfig(), history) == ["HistoryFile"]
    assert names(CONFIG, replace(history, tensorboard=tmp_path)) == [
        *("EarlyStopping", "ReduceLROnPlateau"),
        *("HistoryFile", "TensorBoard"),
    ]


def test_callbacks_without_a_state_are_left_alone(tmp_path: Path) -> None:
    files = LogFiles(history=str(tmp_path / "history.csv"))
    callbacks = make_callbacks(FitConfig(early_stopping_patience=3), files=files, history=[])
    callbacks[0].on_train_begin()
    before = callback_states(callbacks)
    restore_callbacks(callbacks, {"ReduceLROnPlateau": {"wait": 5}})
    assert callback_states(callbacks) == before
    assert list(before) == ["EarlyStopping"]


def test_the_history_is_a_line_an_epoch() -> None:
    history = [an_epoch(1, phase="head, cold", loss=0.5), an_epoch(2, phase="all", loss=1 / 3)]
    text = history_csv(history).decode()
    assert text.splitlines()[:2] == [HEADER, '1,"head, cold",0.5,0.5,0.5,0.5,0.01']
    rows = list(csv.DictReader(text.splitlines()))
    assert [(int(row["epoch"]), row["phase"], float(row["loss"])) for row in rows] == [
        (1, "head, cold", 0.5),
        (2, "all", 1 / 3),
    ]
    assert history_csv([]).decode() == f"{HEADER}\n"


def test_the_history_file_holds_every_epoch_so_far(tmp_path: Path) -> None:
    path, history = tmp_path / "run" / "history.csv", [an_epoch(1)]
    (callback,) = make_callbacks(FitConfig(), files=LogFiles(history=str(path)), history=history)
    callback.on_epoch_end(0, {"loss": 0.5})
    assert path.read_text() == f"{HEADER}\n1,train,0.5,0.5,0.5,0.5,0.01\n"
    history.append(an_epoch(2, loss=0.25))
    callback.on_epoch_end(1, {"loss": 0.25})
    assert path.read_bytes() == history_csv(history)
