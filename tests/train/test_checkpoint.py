from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from equilibria.data import disk
from equilibria.solution import UserError
from equilibria.train import checkpoint
from equilibria.train.config import OptimConfig
from equilibria.train.optimizer import make_optimizer
from equilibria.train.whole import load_whole_optimizer, whole_optimizer, whole_weights


class Tied(nn.Module):
    """Two matrices of which the last is the first again, as in models that tie input and output embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def trained(seed: int, width: int = 4) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied(width)
    optimizer = make_optimizer(model, OptimConfig())
    for _ in range(3):
        model(torch.randn(8, width)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    checkpoint.save_checkpoint(
        folder,
        {"step": step},
        model=whole_weights(model),
        optimizer=whole_optimizer(model, optimizer),
        position=checkpoint.random_state() if position is None else position,
    )


def test_everything_comes_back_bit_for_bit(tmp_path: Path):
    model, optimizer = trained(0)
    position = {"memory/z": torch.randn(2, 3), **checkpoint.random_state()}
    save(tmp_path / "c", model, optimizer, position, step=3)
    expected = torch.rand(5)  # what the generator, as stored, gives next

    other, other_optimizer = trained(1)
    assert checkpoint.load_state(tmp_path / "c")["step"] == 3
    checkpoint.load_weights(tmp_path / "c", other)
    load_whole_optimizer(other, other_optimizer, checkpoint.load_tensors(tmp_path / "c", "optimizer"))
    restored = checkpoint.load_tensors(tmp_path / "c", "position")
    checkpoint.set_random_state(restored)

    assert torch.equal(torch.rand(5), expected)
    assert torch.equal(restored["memory/z"], position["memory/z"])
    assert other.last.weight is other.first.weight
    x = torch.randn(8, 4)
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        each(x).square().sum().backward()
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_no_pickle_in_any_file(tmp_path: Path):
    model, optimizer = trained(0)
    save(tmp_path / "c", model, optimizer)
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == ["", ".json", *[".safetensors"] * 3]


@pytest.mark.parametrize("moment", ["writing", "between the renames", "before the clean-up"])
def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "c"

    def fill_first(folder: Path) -> None:
        (folder / "a").write_text("old")

    disk.write_folder(target, fill_first)

    class Killed(BaseException):
        pass

    rename = Path.rename

    def rename_once(self: Path, to: Path) -> Path:
        if moment == "between the renames" and to == target:
            raise Killed
        return rename(self, to)

    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        if moment == "writing":
            raise Killed

    def keep(path: Path, **options: object) -> None:
        if moment == "before the clean-up" and target.exists() and (target / "a").read_text() == "new":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        if moment == "before the clean-up":
            patch.setattr(shutil, "rmtree", keep)
        with pytest.raises(Killed):
            disk.write_folder(target, fill)
    disk.settle_folder(target)
    assert (target / "a").read_text() == ("new" if moment == "before the clean-up" else "old")
    assert list(tmp_path.iterdir()) == [target]


def test_another_model_is_named(tmp_path: Path):
    model, _ = trained(0)
    checkpoint.save_checkpoint(tmp_path / "c", {}, model=whole_weights(model))
    with pytest.raises(UserError, match=r"another model: first\.weight is \(4, 4\), the model has \(6, 6\)"):
        checkpoint.load_weights(tmp_path / "c", Tied(6))
    with pytest.raises(UserError, match=r"weight is missing; bias is missing; first\.bias is unknown") as caught:
        checkpoint.load_weights(tmp_path / "c", nn.Linear(4, 4))
    assert "and 7 more differences" in str(caught.value)
    assert "\n" not in str(caught.value)


FILES = ["model.safetensors", "optimizer.safetensors", "position.safetensors", "state.json", "SHA256SUMS"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str):
    model, optimizer = trained(0)
    save(tmp_path / "c", model, optimizer)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()

    def load() -> None:
        checkpoint.load_state(tmp_path / "c")
        for part in ("model", "optimizer", "position"):
            checkpoint.load_tensors(tmp_path / "c", part)

    for read in (load, lambda: checkpoint.verify(tmp_path / "c")):
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"is damaged: .*; restore") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or name == "SHA256SUMS"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sha256": 3}'])
def test_damaged_state_is_found(tmp_path: Path, content: str):
    checkpoint.save_checkpoint(tmp_path / "c", {}, model=whole_weights(nn.Linear(1, 1)))
    (tmp_path / "c" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.load_state(tmp_path / "c")


def test_absent_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoint.load_state(tmp_path / "nothing")


def test_json_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "x.json"
    disk.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        disk.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
