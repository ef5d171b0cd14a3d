"""The race's search by KerasTuner's Hyperband, as its users would write it; see `race_networks`."""

import contextlib
import json
import time
from typing import Any

import keras
import keras_tuner

from benchmarks.peers.race_networks import RACE, Arrays, Curve, compiled, result


class Networks(keras_tuner.HyperModel):
    """Any network of the space."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self._arrays = arrays

    def build(self, hp: Any) -> keras.Model:
        names = [space["backbone"] for space in RACE["backbones"]]
        choice = {"backbone": hp.Choice("backbone", names)}
        for space in RACE["backbones"]:
            with hp.conditional_scope("backbone", [space["backbone"]]):
                own = {
                    name: hp.Choice(f"{space['backbone']}.{name}", [str(value) for value in space[name]])
                    for name in ("image_size_px", "pooling")
                }
                if space["backbone"] == choice["backbone"]:
                    choice |= {name: next(v for v in space[name] if str(v) == text) for name, text in own.items()}
        for name in ("hidden_units", "dropout", "optimizer", "label_smoothing"):
            choice[name] = hp.Choice(name, RACE[name])
        choice["learning_rate"] = hp.Float("learning_rate", *RACE["learning_rate"], sampling="log")
        choice["weight_decay"] = hp.Float("weight_decay", *RACE["weight_decay"], sampling="log")
        return compiled(choice, self._arrays)

    def fit(self, hp: Any, model: keras.Model, *args: Any, **options: Any) -> Any:
        batches = self._arrays.batches(
            batch_size=hp.Choice("batch_size", RACE["batch_size"]),
            augmentation=hp.Choice("augmentation", RACE["augmentation"]),
            seed=RACE["seed"],
        )
        return model.fit(batches, *args, **options)


class Deadline(Curve):
    """Ends the search when the time is over."""

    def on_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.is_over:
            raise keras_tuner.errors.FatalError("the time is over")


def main() -> None:
    """Searches for the given time and tests the best model."""
    began = time.time()
    arrays = Arrays()
    tuner = keras_tuner.Hyperband(
        Networks(arrays),
        objective="val_accuracy",
        max_epochs=RACE["trial_epochs"],
        hyperband_iterations=100,
        seed=RACE["seed"],
        directory=RACE["scratch"],
        project_name="race",
    )
    with contextlib.suppress(keras_tuner.errors.FatalError):  # See Deadline.
        tuner.search(validation_data=arrays.validation, verbose=0, callbacks=[Deadline(began)])
    best = tuner.get_best_models(1)[0]
    trials = len(tuner.oracle.trials)
    print(json.dumps(result(best, arrays, began=began, trials=trials, curve=Deadline.points)))


if __name__ == "__main__":
    main()
