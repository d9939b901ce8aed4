"""A memory that a model cannot read is refused by name; one that it can read is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria.models.block import Memory
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig, TrellisMemory

V = 11
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def transformer(pre_norm: bool = False) -> DEQTransformerLM:
    torch.manual_seed(0)
    return DEQTransformerLM(TransformerConfig(vocab_size=V, d_model=8, n_head=2, d_inner=8, mem_len=3, pre_norm=pre_norm))


def trellisnet() -> DEQTrellisNetLM:
    torch.manual_seed(0)
    return DEQTrellisNetLM(TrellisConfig(vocab_size=V, d_embed=4, d_hidden=4, d_output=4))


MODELS = [transformer, lambda: transformer(pre_norm=True), trellisnet]


def read(model: Any, memory: Any, depth: int | None = None) -> Any:
    text = torch.arange(12).view(2, 6) % V
    return model(text[:, :-1], text[:, 1:], memory, depth=depth)


def each(memory: Any, change: Callable[[Tensor], Any]) -> Any:
    return type(memory)(*map(change, memory))


@pytest.mark.parametrize("make", MODELS)
def test_of_another_type(make: Any) -> None:
    model = make()
    memory = read(model, None).memory
    kind = type(memory).__name__
    with pytest.raises(TypeError, match=rf"memory is a tuple; give the {kind} that the segment before returned, or None"):
        read(model, tuple(memory))
    with pytest.raises(TypeError, match=rf"memory is a Tensor; give the {kind}"):
        read(model, memory.z)
    other = TrellisMemory(memory.z) if kind == "Memory" else Memory(memory.z, memory.z)
    with pytest.raises(TypeError, match=rf"memory is a {type(other).__name__}; give the {kind}"):
        read(model, other)
    with pytest.raises(TypeError, match=rf"memory\[0\] is a list; a {kind} is made of tensors"):
        read(model, each(memory, Tensor.tolist))
    with pytest.raises(ValueError, match=r"memory has shapes? \(\)"):
        read(model, each(memory, torch.sum))


@pytest.mark.parametrize("make", MODELS)
def test_on_another_device(make: Any) -> None:
    model = make()
    memory = read(model, None).memory
    with pytest.raises(ValueError, match=r"memory\[0\] is on meta and the model on cpu; move it there"):
        read(model, each(memory, lambda tensor: tensor.to("meta")))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", [BF16, F32, F64])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64, torch.int64, torch.complex64])
def test_of_another_dtype(make: Any, autocast: bool, own: torch.dtype, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Refused by name where torch would fail, and nowhere else, but for integers."""
    model = make().to(own)
    memory = each(read(model, None, depth=2).memory, lambda tensor: tensor.to(dtype))
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "check_memory", lambda *_: None)
            try:
                nll = read(model, memory, depth=2).nll
                fails = dtype == torch.int64
            except (RuntimeError, NotImplementedError):
                nll, fails = torch.empty(0), True
        if fails:
            with pytest.raises(ValueError, match=rf"memory\[0\] has dtype {dtype} and the model {own}; give it that dtype"):
                read(model, memory, depth=2)
        else:
            assert torch.equal(read(model, memory, depth=2).nll, nll)


@pytest.mark.parametrize("make", MODELS)
def test_carried_through_autocast_and_out_of_it(make: Any) -> None:
    model = make()
    with torch.autocast("cpu", BF16):
        memory = read(model, read(model, read(model, None).memory).memory).memory
        read(model, each(memory, Tensor.float))
    read(model, each(memory, Tensor.float))
