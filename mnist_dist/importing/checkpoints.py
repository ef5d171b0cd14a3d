"""Checkpoints of torch: tensors by name, read without executing anything.

Owns: reading safetensors and files of torch, and the wrappings that training scripts put around weights. Does not own:
the models that the weights are for (`timm_models`, `torchvision_models`).
"""

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.errors import WeightsError

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]

_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys below which a checkpoint keeps its weights, the averaged ones first. Source: timm's `load_state_dict`."""
_PREFIXES = ("_orig_mod.", "module.")
"""What `torch.compile` and data parallel training put before each name."""
_COUNTERS = frozenset({"n_averaged"})
"""What torchvision's averaged models hold beside the weights."""


def read_checkpoint(path: Path) -> State:
    """The weights of a file.

    Args:
        path: safetensors, or what `torch.save` wrote: a state dict, bare or below a usual key.

    Raises:
        WeightsError: there is no such file, it is neither, or it needs more than tensors; then nothing of it was
            executed.
    """
    if not path.is_file():
        raise WeightsError(f"there is no such checkpoint. Received: {str(path)!r}")
    content = _safetensors(path) if _is_safetensors(path) else _torch_file(path)
    state = {_bare(name): value for name, value in _unwrapped(content, path).items() if name not in _COUNTERS}
    others = [name for name, value in state.items() if not hasattr(value, "shape")]
    if others or not state:
        raise WeightsError(f"a checkpoint holds tensors by name. Received: {others[:3] or 'none'} in {str(path)!r}")
    return state


def _is_safetensors(path: Path) -> bool:
    """Whether a JSON header follows its eight-byte length; names prove nothing."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as err:
        raise WeightsError(f"safetensors files need `pip install safetensors`. Received: {str(path)!r}") from err
    try:
        return load_file(path)
    except Exception as err:  # safetensors' own errors have no common base
        raise WeightsError(f"the safetensors file cannot be read: {err}. Received: {str(path)!r}") from err


def _torch_file(path: Path) -> Any:
    import torch

    try:
        # timm keeps its arguments in a Namespace; torch warns of each old pickle.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise WeightsError(
            "the checkpoint needs more than tensors: as a pickle it could run any code, so it was not loaded. Save the "
            f"weights alone, torch.save(model.state_dict(), FILE), or as safetensors. Received: {str(path)!r}"
        ) from err
    except Exception as err:  # of a damaged or other file: RuntimeError, EOFError, zipfile's own
        raise WeightsError(f"this is no file of torch ({type(err).__name__}). Received: {str(path)!r}") from err


def _unwrapped(content: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping):
        for key in _WRAPPINGS:
            if isinstance(content.get(key), Mapping):
                inner: Mapping[str, Any] = content[key]
                return inner
        if all(isinstance(key, str) for key in content):
            return content
    raise WeightsError(f"a checkpoint holds tensors by name. Received: {type(content).__name__} in {str(path)!r}")


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name[name.index(".") + 1 :]
    return name
