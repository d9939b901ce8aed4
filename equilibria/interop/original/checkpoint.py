"""Reading checkpoints of the original code without running anything that is in them.

The original writes `torch.save(model.state_dict())`: in 2019 a sequence of pickles (the legacy container), with PyTorch 1.6
and later a zip archive; either may say that its tensors lie on a GPU. A pickle can call any function it names, so the files
are read by the part of PyTorch that knows tensors alone (`weights_only=True`), and everything else is refused.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibria.solution import UserError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_FOLDER = 0x10  # attribute of an entry in an archive
_REMEDY = "give a file written by torch.save(model.state_dict())"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that the original saved, on the CPU, bit for bit; tied ones share their memory.

    Raises:
        UserError: the file is none, is damaged, or holds anything but finite floating-point tensors by name.

        read_checkpoint(Path("pretrained.pkl"))["inject_conv.bias"]
    """
    _check_container(path)
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own doing, on old containers
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the byte that is wrong leads to
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    return _checked(loaded, path)


def _check_container(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; {_REMEDY}")
    if not path.is_file():
        raise UserError(f"there is no file {path}; {_REMEDY}")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty; {_REMEDY}")
    if start[8:] == b"{":
        raise UserError(f"{path} is a safetensors file, which the original never wrote; {_REMEDY}")
    if not start.startswith((_ZIP, _PICKLE)):
        raise UserError(f"{path} is not a file of torch.save; {_REMEDY}")


def _check_sums(path: Path) -> None:
    """An archive must hold what was written, which PyTorch does not check. The legacy container has no checksums."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("torch.save compresses nothing")
        if any(entry.external_attr & _FOLDER for entry in entries):  # PyTorch would give memory as it finds it
            raise zipfile.BadZipFile("torch.save has no folders")
        wrong = archive.testzip()
    if wrong is not None:
        raise zipfile.BadZipFile(f"the checksum of {wrong!a} is wrong")


def _reason(error: Exception) -> str:
    text = str(error)
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]{1,100})", text, re.ASCII)
    if match:
        return (
            f"it is no plain state dict, but would run code when unpickled ({match.group(1)}), as a model saved whole "
            "does, and nothing was run; load it with the original code and save its state_dict()"
        )
    if "TorchScript" in text:
        return f"it is a TorchScript archive; {_REMEDY}"
    what = text if isinstance(error, zipfile.BadZipFile) else type(error).__name__
    return f"it is damaged, or not a file of torch.save ({what[:100]}); {_REMEDY}"


def _checked(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict; {_REMEDY}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            some = ", ".join(ascii(key)[:40] for key in list(loaded)[:3])
            raise UserError(f"{path} is not a state dict, for not all of its entries ({some}, ...) are tensors; {_REMEDY}")
        if not re.fullmatch(r"[\w.]{1,200}", name, re.ASCII):  # or it would be printed later on
            raise UserError(f"{path} is not a state dict, for {name[:40]!a} is no name of a parameter; {_REMEDY}")
        problem = _problem(tensor)
        if problem:
            raise UserError(f"{path} is not a checkpoint of the original: {name} {problem}")
        tensors[name] = tensor.detach()
    return tensors


def _problem(tensor: Tensor) -> str | None:
    """What no tensor of the original's has."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "is not a plain dense tensor"
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')} numbers"
    if tensor.numel() == 0:
        return "is empty"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "is larger than what is stored of it"
    if not tensor.isfinite().all():
        return "holds numbers that are infinite or NaN"
    return None
