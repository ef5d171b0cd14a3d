"""Opens the computation of a worker on the backend that Keras was imported with; each backend is one module.

Owns: the choice. Does not own: which backend a job asks for (`on_ray/training/backend.py`).
"""

import keras

from mnist_dist.training.feed import World
from mnist_dist.training.step import Computation


def open_computation(world: World) -> Computation:
    """The computation of one worker of a run; see `step.Computation`."""
    if keras.backend.backend() == "jax":
        from mnist_dist.training.jax_step import JaxComputation

        return JaxComputation(world)
    from mnist_dist.training.tensorflow_step import TensorflowComputation

    return TensorflowComputation(world)
