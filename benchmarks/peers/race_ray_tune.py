"""The race's search by Ray Tune with Optuna and ASHA, as their users would write it; see `race_networks`."""

import json
import os
import tempfile
import time
from typing import Any

import keras
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks.peers import race_networks
from benchmarks.peers.race_networks import RACE, Arrays, compiled, result

ACCURACY = "val_accuracy"


def space(trial: Any) -> dict[str, Any]:
    """Draws a configuration; Optuna calls it."""
    names = [space["backbone"] for space in RACE["backbones"]]
    name = trial.suggest_categorical("backbone", names)
    own = next(space for space in RACE["backbones"] if space["backbone"] == name)
    for key in ("image_size_px", "pooling"):
        trial.suggest_categorical(f"{name}.{key}", own[key])
    for key in ("hidden_units", "dropout", "optimizer", "label_smoothing", "batch_size", "augmentation"):
        trial.suggest_categorical(key, RACE[key])
    for key in ("learning_rate", "weight_decay"):
        trial.suggest_float(key, *RACE[key], log=True)
    return {"race": RACE}


def choice_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the settings of its own backbone."""
    name = config["backbone"]
    return {**config, **{key: config[f"{name}.{key}"] for key in ("image_size_px", "pooling")}}


def train(config: dict[str, Any]) -> None:
    """One trial."""
    race_networks.RACE.update(config["race"])  # not ours: this module is sent to the workers by value
    arrays, choice = Arrays(), choice_of(config)
    model = compiled(choice, arrays)
    batches = arrays.batches(
        batch_size=choice["batch_size"], augmentation=choice["augmentation"], seed=config["race"]["seed"]
    )

    class Report(keras.callbacks.Callback):
        best = 0.0

        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            metrics, checkpoint = dict(logs or {}), None
            with tempfile.TemporaryDirectory() as folder:
                if metrics[ACCURACY] > self.best:
                    self.best = metrics[ACCURACY]
                    model.save_weights(os.path.join(folder, "best.weights.h5"))
                    checkpoint = tune.Checkpoint.from_directory(folder)
                tune.report({ACCURACY: metrics[ACCURACY], "at": time.time()}, checkpoint=checkpoint)

    model.fit(
        batches,
        validation_data=arrays.validation,
        epochs=config["race"]["trial_epochs"],
        verbose=0,
        callbacks=[Report()],
    )


def main() -> None:
    """Searches for the given time and tests the best model."""
    began = time.time()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            metric=ACCURACY,
            mode="max",
            search_alg=OptunaSearch(space, metric=ACCURACY, mode="max", seed=RACE["seed"]),
            scheduler=ASHAScheduler(max_t=RACE["trial_epochs"], grace_period=1, reduction_factor=3),
            num_samples=-1,
            time_budget_s=max(1.0, RACE["seconds"] - (time.time() - began)),
            max_concurrent_trials=os.cpu_count(),
        ),
        run_config=tune.RunConfig(
            storage_path=RACE["scratch"],
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=ACCURACY, checkpoint_score_order="max"
            ),
        ),
    )
    results = tuner.fit()
    best = results.get_best_result(metric=ACCURACY, mode="max", scope="all")
    arrays = Arrays()
    model = compiled(choice_of(best.config), arrays)
    checkpoint = max(best.best_checkpoints, key=lambda pair: pair[1][ACCURACY])[0]
    with checkpoint.as_directory() as folder:
        model.load_weights(os.path.join(folder, "best.weights.h5"))
    print(json.dumps(result(model, arrays, began=began, trials=len(results), curve=curve_of(results, began))))


def curve_of(results: Any, began: float) -> list[tuple[float, float]]:
    """The best validation accuracy so far over time."""
    rows = [
        row for each in results if each.metrics_dataframe is not None for row in each.metrics_dataframe.itertuples()
    ]
    points: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row.at):
        if not points or row.val_accuracy > points[-1][1]:
            points.append((row.at - began, row.val_accuracy))
    return points


if __name__ == "__main__":
    main()
