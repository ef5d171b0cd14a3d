"""KerasTuner's random search of a head on a frozen backbone, as its users would write it: `fit` on arrays, with the
whole network in every trial.

Run as `python -m benchmarks.peers.keras_tuner_search ARGUMENT`, the argument a JSON object: `arrays` (an
.npz of pixels, labels, val_pixels, val_labels), `scratch`, `alpha`, `size_px`, `trials`, `epochs`, `seed` and the
values of the space. Prints `{"seconds": ..., "best": ...}` as its last line, without start-up time.
"""

import json
import sys
import time
from typing import Any

import keras
import keras_tuner
import numpy as np

SPACE = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}


class Head(keras_tuner.HyperModel):
    """A dense head on a frozen MobileNet."""

    def build(self, hp: Any) -> keras.Model:
        size_px = SPACE["size_px"]
        base = keras.applications.MobileNet(
            alpha=SPACE["alpha"], include_top=False, weights=None, input_shape=(size_px, size_px, 3), pooling="avg"
        )
        base.trainable = False
        image = keras.Input(SPACE["shape"])
        x = keras.ops.image.resize(image, (size_px, size_px))
        x = keras.ops.concatenate([x, x, x], axis=-1) if SPACE["shape"][-1] == 1 else x
        x = base(keras.layers.Rescaling(1 / 127.5, offset=-1)(x), training=False)
        hidden = hp.Choice("hidden_units", SPACE["hidden_units"])
        if hidden:
            x = keras.layers.Dense(hidden, activation="relu")(x)
        x = keras.layers.Dropout(hp.Choice("dropout", SPACE["dropout"]))(x)
        model = keras.Model(image, keras.layers.Dense(SPACE["classes"], activation="softmax")(x))
        rate = hp.Float("learning_rate", *SPACE["learning_rate"], sampling="log")
        model.compile(
            optimizer=keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        return model

    def fit(self, hp: Any, model: keras.Model, *args: Any, **options: Any) -> Any:
        return model.fit(*args, batch_size=hp.Choice("batch_size", SPACE["batch_size"]), **options)


def main() -> None:
    """Searches and prints how long it took."""
    with np.load(SPACE["arrays"]) as arrays:
        x, y, val_x, val_y = (arrays[name] for name in ("pixels", "labels", "val_pixels", "val_labels"))
    tuner = keras_tuner.RandomSearch(
        Head(),
        objective="val_accuracy",
        max_trials=SPACE["trials"],
        seed=SPACE["seed"],
        directory=SPACE["scratch"],
        project_name="search",
    )
    began = time.perf_counter()
    tuner.search(x, y, validation_data=(val_x, val_y), epochs=SPACE["epochs"], verbose=0)
    seconds = time.perf_counter() - began
    best = tuner.oracle.get_best_trials(1)[0].score
    print(json.dumps({"seconds": seconds, "best": best}))


if __name__ == "__main__":
    main()
