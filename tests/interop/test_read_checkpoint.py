"""Checkpoints of the original are read bit for bit, whatever the container; anything else is refused in one line, unrun."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria.interop.original.checkpoint import read_checkpoint
from equilibria.solution import UserError

save_safetensors = pytest.importorskip("safetensors.torch").save_file

CONTAINERS = {"zip": True, "legacy": False}


def state_dict() -> dict[str, Tensor]:
    weight = torch.randn(3, 2)
    return OrderedDict(
        [("first", weight), ("again", weight), ("half", torch.randn(4).half()), ("scalar", torch.tensor(1.5))]
    )


def saved(folder: Path, what: Any, container: str) -> Path:
    path = folder / "saved.pkl"
    torch.save(what, path, _use_new_zipfile_serialization=CONTAINERS[container])
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("container", CONTAINERS)
def test_bit_for_bit(tmp_path: Path, container: str) -> None:
    expected = state_dict()
    found = read_checkpoint(saved(tmp_path, expected, container))
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.device.type == "cpu"
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes()
    assert found["first"].data_ptr() == found["again"].data_ptr()


def test_recorded_containers_hold_the_same(shared_golden: Path) -> None:
    for folder in sorted(shared_golden.glob("checkpoint_*")):
        first, *others = (read_checkpoint(folder / f"{name}.pkl") for name in ("zip", "legacy", "legacy_cuda"))
        assert len(first) > 10
        for other in others:
            assert list(other) == list(first)
            assert all(torch.equal(other[name], first[name]) for name in first)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", [*CONTAINERS, "pickle"])
@pytest.mark.parametrize("place", ["alone", "as a value", "as a key"])
def test_no_code_is_run(tmp_path: Path, container: str, place: str) -> None:
    mark = tmp_path / "payload"
    payload = Payload(mark)
    what = {"alone": payload, "as a value": {"a": payload}, "as a key": {(payload,): torch.ones(1)}}[place]
    if container == "pickle":
        path = tmp_path / "saved.pkl"
        path.write_bytes(pickle.dumps(what, protocol=2))
    else:
        path = saved(tmp_path, what, container)
    message = refusal(path)
    assert "nothing was run" in message or container == "pickle"
    assert not mark.exists()
    if container == "pickle" and place == "alone":
        pickle.loads(path.read_bytes())  # the payload is one
        assert mark.exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_whole_model_is_refused_by_name(tmp_path: Path, container: str) -> None:
    message = refusal(saved(tmp_path, nn.Linear(2, 2), container))
    assert "torch.nn.modules.linear.Linear" in message
    assert "save its state_dict()" in message


OTHERS: dict[str, tuple[Any, str]] = {
    "list": ([torch.ones(2)], "holds a list"),
    "tensor": (torch.ones(2), "holds a Tensor"),
    "nested": ({"model": {"a": torch.ones(2)}, "epoch": 3}, "not all of its entries"),
    "numbered": ({1: torch.ones(2)}, "not all of its entries"),
    "a name that clears the screen": ({"\x1b[2J": torch.ones(2)}, r"'\x1b[2J' is no name of a parameter"),
    "a long name": ({"a" * 10**5: torch.ones(2)}, "is no name of a parameter"),
    "no name": ({"": torch.ones(2)}, "'' is no name of a parameter"),
    "integers": ({"a": torch.ones(2, dtype=torch.int64)}, "a holds int64 numbers"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "a holds complex64 numbers"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "a is not a plain dense tensor"),
    "empty": ({"a": torch.ones(0, 2)}, "a is empty"),
    "expanded": ({"a": torch.ones(1).expand(100, 1000)}, "a is larger than what is stored"),
    "infinite": ({"a": torch.tensor([1.0, torch.inf])}, "a holds numbers that are infinite or NaN"),
    "NaN": ({"a": torch.tensor([torch.nan])}, "a holds numbers that are infinite or NaN"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_other_contents(tmp_path: Path, container: str, name: str) -> None:
    what, words = OTHERS[name]
    assert words in refusal(saved(tmp_path, what, container))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    path = tmp_path / "file"
    assert "there is no file" in refusal(path)
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    for content in (b"a", b"a text\n" * 100, bytes(100), b"\x80", b"\x80\x02.", b"PK\x03\x04", os.urandom(3) + bytes(1000)):
        path.write_bytes(content)
        refusal(path)
    save_safetensors({"a": torch.ones(2)}, path)
    assert "is a safetensors file" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/data.pkl", b"a text")
    refusal(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refusal(path)
    path.write_bytes(pickle.dumps({"a": [1.0]}))
    refusal(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_short(tmp_path: Path, container: str) -> None:
    path = saved(tmp_path, state_dict(), container)
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        refusal(path)


def test_a_tensor_that_an_archive_calls_a_folder(tmp_path: Path) -> None:
    """PyTorch reads such an entry as whatever lies in memory."""
    path = saved(tmp_path, state_dict(), "zip")
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
        for entry in archive.infolist():
            whole[position + 38] |= 0x10
            path.write_bytes(whole)
            refusal(path)
            whole[position + 38] ^= 0x10
            position += 46 + len(entry.orig_filename) + len(entry.extra) + len(entry.comment)


@pytest.mark.parametrize("container", CONTAINERS)
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, container: str) -> None:
    """Nor do they go unnoticed, but for those in the numbers of the legacy container, which has no checksums."""
    expected = state_dict()
    path = saved(tmp_path, expected, container)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except UserError:
            refused += 1
        else:
            same = all(torch.equal(tensor, expected[name]) for name, tensor in found.items() if name in expected)
            assert same or container == "legacy"
    assert refused > 50
