"""uploads: one checkpoint at a time is on its way, and one that failed is not passed over (on Ray: test_train.py)."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mnist_dist.errors import ServiceError
from mnist_dist.on_ray.training.uploads import Uploads


def a_checkpoint(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "state.json").write_text(name)
    return folder / name


def test_the_next_checkpoint_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    done, let_go = list[str](), threading.Event()

    def upload(folder: Path, name: str) -> str:
        let_go.wait()
        done.append((folder / "state.json").read_text())
        return f"{name} uploaded"

    def wait_and_look() -> list[str]:
        uploads.wait()
        return list(done)

    uploads = Uploads(upload)
    uploads.wait()
    with ThreadPoolExecutor(2) as threads:
        with uploads.begun():
            first = threads.submit(uploads.run, a_checkpoint(tmp_path, "one"), "one")
        second = threads.submit(wait_and_look)
        assert not second.done()
        let_go.set()
        assert second.result() == ["one"]
        assert first.result() == "one uploaded"
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_failed_is_told_whenever_someone_waits(tmp_path: Path) -> None:
    def upload(folder: Path, name: str) -> None:
        raise ServiceError("the disk is full")

    uploads = Uploads(upload)
    with uploads.begun(), pytest.raises(ServiceError, match="the disk is full"):
        uploads.run(a_checkpoint(tmp_path, "one"), "one")
    for _ in range(2):
        with pytest.raises(ServiceError, match="the disk is full"):
            uploads.wait()


def test_nobody_waits_for_an_upload_that_was_never_ordered() -> None:
    uploads = Uploads(lambda folder, name: None)
    with pytest.raises(SystemExit), uploads.begun():
        raise SystemExit
    uploads.wait()
