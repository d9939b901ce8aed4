"""Weights and optimizer state as whole tensors by name, whether each process holds all of them or a shard.

So what a checkpoint holds does not depend on how many processes trained. All processes of a job call these together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from equilibria.train.distributed import ALONE, Ranks


def whole_weights(model: nn.Module, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Parameters and buffers by name, where tied ones are the very same tensor. Of use on the first process alone."""
    found: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in _tensors(model):
        if id(tensor) not in found:
            found[id(tensor)] = _whole(tensor, ranks)
        weights[name] = found[id(tensor)]
    return weights


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, as "<parameter>/<item>". Of use on the first process alone."""
    names: dict[int, str] = {}
    for name, tensor in _tensors(model):
        names.setdefault(id(tensor), name)
    return {
        f"{names[id(parameter)]}/{item}": _whole(tensor, ranks)
        for parameter, kept in optimizer.state.items()
        for item, tensor in kept.items()
    }


def load_whole_weights(model: nn.Module, weights: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Set parameters and buffers to those that the first process gives; of a tied one, any of its names will do."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _tensors(model):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        given = next((weights[name] for name in names[key] if name in weights), None)
        _set(tensor.detach(), given, ranks)


def load_whole_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, items: dict[str, Tensor], ranks: Ranks = ALONE
) -> None:
    """Make what the optimizer keeps what the first process gives: for Adam, the running means and the number of steps."""
    parameters = dict(_tensors(model))
    optimizer.state.clear()
    kinds = ranks.from_main(lambda: {key: (tensor.shape, tensor.dtype) for key, tensor in items.items()})
    for key, (shape, dtype) in kinds.items():
        name, item = key.rsplit("/", 1)
        parameter = parameters[name]
        if shape == parameter.shape and len(shape) > 0:
            kept = torch.empty_like(parameter, dtype=dtype, requires_grad=False)  # sharded as the parameter is
        else:  # the number of steps, which is counted on the CPU
            kept = torch.empty(shape, dtype=dtype)
        _set(kept, items.get(key), ranks)
        optimizer.state[parameter][item] = kept


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers as the optimizer knows them: shards, though a forward pass left them whole."""
    if isinstance(model, FSDPModule):
        model.reshard()
    yield from model.state_dict(keep_vars=True).items()


def _whole(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A shard is gathered on every process, but kept by the first alone, and not on its GPU."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if ranks.is_main else whole.new_empty(0)


@torch.no_grad()
def _set(target: Tensor, given: Tensor | None, ranks: Ranks) -> None:
    """Fill a tensor with the one that the first process was given."""
    if isinstance(target, DTensor):
        # Only the values of the first process count; the others contribute but the shape.
        whole = torch.empty(target.shape, dtype=target.dtype, device=ranks.device)
        if given is not None:
            whole.copy_(given)
        shards = distribute_tensor(whole, target.device_mesh, target.placements)
        target.to_local().copy_(shards.to_local())
    else:
        if given is not None:
            target.copy_(given)
        ranks.broadcast(target)
