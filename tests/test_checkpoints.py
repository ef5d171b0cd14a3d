"""checkpoints: what is written is read, and what is unfinished is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from harness import an_epoch

from mnist_dist.errors import StorageError
from mnist_dist.training.checkpoints import Arrays, Checkpoint, State, read_checkpoint, write_checkpoint


def arrays(seed: int) -> Arrays:
    """More than ten, so that an order by name and one by number differ; scalars and whole numbers among them."""
    random = np.random.default_rng(seed)
    weights: Arrays = [random.normal(size=(3, size)).astype(np.float32) for size in range(1, 12)]
    return [*weights, np.array(17 + seed, np.int64), np.array(0.25, np.float32)]


def state(**fields: object) -> State:
    given: dict[str, object] = {
        "phase": 1,
        "epoch": 2,
        "step": 3,
        "epochs_done": 5,
        "global_step": 57,
        "epoch_sums": [0.1 + 0.2, 7.0, 8.0],
        "learning_rate": 1e-3 / 3,
        "history": [an_epoch(1, phase="head", val_loss=1 / 3)],
        "best": an_epoch(1, phase="head", val_loss=1 / 3),
        "callbacks": {"EarlyStopping": {"wait": 1, "best": 1 / 3, "best_epoch": None}},
        "timed_images": 640,
        "timed_s": 0.7,
        "seconds": 12.5,
    }
    return State(**{**given, **fields})  # type: ignore[arg-type]


def same(ours: Arrays | None, theirs: Arrays | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    pairs = zip(ours, theirs, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) for a, b in pairs)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Checkpoint(state=state(), weights=arrays(1), optimizer=arrays(2), best=arrays(3))
    write_checkpoint(tmp_path, written)
    read = read_checkpoint(tmp_path)
    assert read.state == written.state
    assert same(read.weights, written.weights)
    assert same(read.optimizer, written.optimizer)
    assert same(read.best, written.best)


def test_every_field_of_the_state_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(state=state(), weights=[], optimizer=[], best=None))
    assert json.loads((tmp_path / "state.json").read_text()) == dataclasses.asdict(state())


def test_best_weights_that_are_the_current_ones_are_written_once(tmp_path: Path) -> None:
    weights = arrays(1)
    write_checkpoint(
        tmp_path, Checkpoint(state=state(best_is_current=True), weights=weights, optimizer=[], best=weights)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.npz", "state.json", "weights.npz"]
    assert same(read_checkpoint(tmp_path).best, weights)


def test_current_best_weights_are_not_taken_from_what_an_earlier_checkpoint_left(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(state=state(), weights=arrays(1), optimizer=[], best=arrays(2)))
    again = Checkpoint(state=state(best_is_current=True), weights=arrays(3), optimizer=[], best=arrays(3))
    write_checkpoint(tmp_path, again)  # as a copy to S3 under the same name does, which deletes nothing
    assert same(read_checkpoint(tmp_path).best, arrays(3))


def test_without_best_weights_there_are_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(state=State(), weights=arrays(1), optimizer=[], best=None))
    assert read_checkpoint(tmp_path).best is None


@pytest.mark.parametrize("left", [[], ["weights.npz", "optimizer.npz", "best.npz"]])
def test_a_folder_without_its_last_file_is_unfinished(tmp_path: Path, left: list[str]) -> None:
    write_checkpoint(tmp_path, Checkpoint(state=state(), weights=arrays(1), optimizer=[], best=arrays(2)))
    for path in tmp_path.iterdir():
        if path.name not in left:
            path.unlink()
    with pytest.raises(StorageError, match=rf"unfinished: it has no state\.json\. Received: {tmp_path}$"):
        read_checkpoint(tmp_path)


def test_the_state_is_written_last(tmp_path: Path) -> None:
    (tmp_path / "optimizer.npz").mkdir()  # where a file cannot be written
    with pytest.raises(IsADirectoryError, match=r"optimizer\.npz"):
        write_checkpoint(tmp_path, Checkpoint(state=state(), weights=arrays(1), optimizer=arrays(2), best=None))
    assert not (tmp_path / "state.json").exists()
