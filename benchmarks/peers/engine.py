"""An engine of our job alone, always on the same ready batch and on all cores. The baseline of our job."""

import numpy as np

from benchmarks.peers.task import Task, call_again_and_again
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.models.bundle import load_bundle


def main() -> None:
    """Calls the engine for the task's number of seconds."""
    task = Task.from_command_line()
    bundle = load_bundle(task.bundle)
    choice = EngineChoice(engine=task.engine, precision=task.precision, uri=task.engine_uri)  # type: ignore[arg-type] # from JSON
    engine = open_engine(choice, bundle, batch_size=task.batch_size)
    shape = (task.batch_size, *bundle.info.spec.shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    call_again_and_again(lambda: engine(pixels), task, at_once=engine.calls_at_once)


if __name__ == "__main__":
    main()
