"""The one table of sources: how each is recognised, and who opens it.

Owns: the table, and bringing a remote source to this machine. Does not own: any source.

Files and folders decide by what they hold, never by what they are called, but for the suffix of a single file.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mnist_dist.config import StoreConfig
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Foreign
from mnist_dist.store.anywhere import ANYWHERE, store_for
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, is_remote, join

Open = Callable[[ImportJob, Path, Report], Foreign]
"""Opens the source that the job names, a local path or a name; files that it writes go into the folder."""


@dataclass(frozen=True)
class Source:
    """A row of the table."""

    kind: str
    what: str
    """For messages."""
    module: str
    """Imported only when it is needed: it may load a framework."""
    function: str
    prefix: str = ""
    """Of a name, such as `timm:`."""
    suffixes: tuple[str, ...] = ()
    """Of a single file."""
    members: tuple[tuple[str, ...], ...] = ()
    """A folder is one if it has any of these sets of files."""

    @property
    def open(self) -> Open:
        """The function that opens such a source."""
        opened: Open = getattr(importlib.import_module(f"{__package__}.{self.module}"), self.function)
        return opened


SOURCES = (
    Source("keras", "a Keras model (.keras, .h5)", "keras_models", "open_keras", suffixes=(".keras", ".h5", ".hdf5")),
    Source("onnx", "an ONNX file", "onnx_models", "open_onnx", suffixes=(".onnx",)),
    Source(
        "saved_model",
        "a SavedModel folder (saved_model.pb)",
        "saved_models",
        "open_saved_model",
        members=(("saved_model.pb",),),
    ),
    Source(
        "hugging_face",
        "a Hugging Face folder (config.json, preprocessor_config.json, model.onnx or onnx/model.onnx)",
        "hugging_face",
        "open_hugging_face",
        members=tuple(("config.json", name) for name in ("model.onnx", "onnx/model.onnx", "onnx/vision_model.onnx")),
    ),
    Source(
        "timm",
        "timm:NAME, or a folder saved by timm (config.json and model.safetensors or pytorch_model.bin)",
        "timm_models",
        "open_timm",
        prefix="timm:",
        members=(("config.json", "model.safetensors"), ("config.json", "pytorch_model.bin")),
    ),
    Source("torchvision", "torchvision:NAME", "torchvision_models", "open_torchvision", prefix="torchvision:"),
)
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".bin", ".safetensors")


def find_source(name: str) -> Source:
    """The row of a source.

    Raises:
        ConfigError: there is no such file or folder, or it is no source; the message says which there are.
    """
    for source in SOURCES:
        if source.prefix and name.startswith(source.prefix):
            return source
    kinds = "; ".join(source.what for source in SOURCES)
    uri = absolute(name)
    suffix = Path(name.rstrip("/")).suffix.lower()
    for source in SOURCES:
        if suffix in source.suffixes:
            if not ANYWHERE.exists(uri):
                raise ConfigError(f"there is no such file{what_is_there(uri)}. Received: {name!r}")
            return source
        if any(all(ANYWHERE.exists(join(uri, *member.split("/"))) for member in members) for members in source.members):
            return source
    if suffix in _PICKLES:
        raise ConfigError(
            "weights alone are no model: name its architecture, as in `import timm:resnet18 --checkpoint FILE`. "
            f"Received: {name!r}"
        )
    exists = any(True for _ in ANYWHERE.scan_entries(uri)) if not ANYWHERE.exists(uri) else True
    found = f"{'this is none of them' if exists else 'there is no such file or folder'}{what_is_there(uri)}"
    raise ConfigError(f"a model to import is {kinds}; {found}. Received: {name!r}")


def localized(job: ImportJob, source: Source, scratch: Path) -> ImportJob:
    """The job with its source and checkpoint on this machine, copied where they are remote."""
    checkpoint = None if job.checkpoint is None else str(ANYWHERE.local_path(absolute(job.checkpoint), scratch))
    if source.prefix and job.source.startswith(source.prefix):
        return replace(job, checkpoint=checkpoint)
    uri = absolute(job.source)
    if not is_remote(uri):
        return replace(job, source=uri, checkpoint=checkpoint)
    folder = scratch / "source"
    if not source.members:
        file = ANYWHERE.local_path(uri, folder)
        for other in _named_in(file) if source.kind == "onnx" else ():
            ANYWHERE.download(join(uri.rpartition("/")[0], other), file.parent / other)
        return replace(job, source=str(file), checkpoint=checkpoint)
    store_for(StoreConfig()).download_folder(uri, folder)
    return replace(job, source=str(folder), checkpoint=checkpoint)


def digest_of(job: ImportJob) -> str:
    """sha256 over the names and contents of the files of a local source and its checkpoint, but for hidden files and
    texts for people."""
    root = Path(job.source)
    total = hashlib.sha256(b"" if root.exists() else job.source.encode())
    files = _files_below(root) if root.is_dir() else [root] if root.exists() else []
    if root.suffix.lower() == ".onnx":
        files += [root.parent / name for name in _named_in(root)]
    for path in [*files, *([Path(job.checkpoint)] if job.checkpoint else [])]:
        name = path.relative_to(root).as_posix() if root in path.parents else path.name
        with path.open("rb") as file:
            total.update(f"{name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    def is_read(path: Path) -> bool:
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.is_file() and not is_hidden and path.suffix.lower() not in (".md", ".txt")

    return sorted(filter(is_read, folder.rglob("*")))


def _named_in(file: Path) -> list[str]:
    """The files beside an ONNX file that hold its weights; none if it is not one."""
    from mnist_dist.importing.onnx_graph import external_locations  # loads onnx

    return external_locations(file)
