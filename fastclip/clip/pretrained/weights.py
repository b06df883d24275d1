"""Reads state dicts: safetensors, torch's files, TorchScript archives, folders."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .keys import State, listed

# The first of these in a folder holds the weights. open_clip's come first: beside them,
# model.safetensors may hold timm's image tower alone.
NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
    "pytorch_model.bin", "clip.safetensors",
)  # fmt: skip


def file_of(path: Path) -> Path:
    """Returns the file with the weights: the path itself, or one in the folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the weights are split into several files.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    if parts := sorted(path.glob("*.index.json")):
        raise ValueError(f"the weights must be in one file, got {parts[0]}")
    raise FileNotFoundError(f"{path} must hold one of {', '.join(NAMES)}")


def is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())


def read(path: Path) -> State:
    """Returns the state dict of a file. Runs no code of a pickle.

    Raises:
        ValueError: the file has none.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if zipfile.is_zipfile(path):
            if is_torchscript(path):
                return torch.jit.load(os.fspath(path), map_location="cpu").state_dict()
        elif start[8:] == b"{":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # readers raise almost any; torch's also advise to run a pickle's code
        raise ValueError(
            f"cannot read weights from {path}: it must be a complete file of safetensors, of "
            "TorchScript, or of torch.save that holds tensors alone"
        ) from None
    return state_dict(found)


def state_dict(found: Any) -> State:
    """Returns the state dict, taken out of a training checkpoint's "state_dict".

    Raises:
        ValueError: it is no dict of tensors.
    """
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ValueError(f"the weights must be a state dict, got {type(found).__name__}")
    others = [str(k) for k, v in found.items() if not isinstance(v, torch.Tensor | int)]
    if others:
        raise ValueError(f"a state dict must hold tensors, got others: {listed(others)}")
    return found


def read_config(config: Any, beside: Path | None, name: str) -> dict[str, Any] | None:
    """Returns the configuration of the model, None if there is none.

    Args:
        config: a dict, a file, a folder with a file `name`, or None.
        beside: the folder of the weights, which is searched if `config` is None.

    Raises:
        ValueError: the file is no JSON object.
        FileNotFoundError: `config` names no file.
    """
    if isinstance(config, dict):
        return config
    if config is not None:
        path = Path(config)
        path = path / name if path.is_dir() else path
    elif beside is not None and (beside / name).is_file():
        path = beside / name
    else:
        return None
    found = json_object(path)
    preprocessor = path.parent / "preprocessor_config.json"
    if "preprocessor" not in found and preprocessor.is_file():
        found["preprocessor"] = json_object(preprocessor)
    return found


def json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
