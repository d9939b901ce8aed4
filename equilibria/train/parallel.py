"""How the processes of a job hold one model, through Accelerate: each the whole of it (DDP), or each a shard (FSDP2)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    convert_outputs_to_fp32,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from equilibria.solution import UserError
from equilibria.train.config import RunConfig
from equilibria.train.distributed import Ranks
from equilibria.train.optim_config import OptimConfig
from equilibria.train.optimizer import make_optimizer


def as_launched(config: RunConfig) -> RunConfig:
    """The configuration with what `accelerate launch` was asked for, where it says nothing of its own."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise UserError(f"accelerate was launched with --mixed_precision {asked}; give no or bf16")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("accelerate was launched with DeepSpeed; use --parallel ddp or fsdp, and launch without it")
    precision = "bf16" if asked == "bf16" else config.precision
    parallel = config.parallel or ("fsdp" if _flag("ACCELERATE_USE_FSDP") else None)
    return dataclasses.replace(config, precision=precision, parallel=parallel)


def make_accelerator(config: RunConfig, ranks: Ranks) -> Accelerator:
    """Accelerate for one training run; gradients are accumulated by the loop, not by it."""
    several = ranks.count > 1
    sharded = several and config.parallel == "fsdp"
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()  # what was launched is in the configuration
    plugin = _sharding() if sharded else None
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        cpu=several and ranks.device.type == "cpu",
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    # Accelerate by itself shards on GPUs alone, and the first model of a process alone: later ones find its state made.
    state: Any = accelerator.state
    if sharded:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    elif several and ranks.device.type == "cpu":
        state.distributed_type = DistributedType.MULTI_CPU
    return accelerator


def prepare(accelerator: Accelerator, model: nn.Module, config: OptimConfig) -> tuple[Any, torch.optim.Optimizer]:
    """The model as the processes hold it, and the optimizer of what this process holds."""
    if not accelerator.is_fsdp2:
        with warnings.catch_warnings():  # the new name of this option is not known to every version of PyTorch we run on
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return accelerator.prepare_model(model), make_optimizer(model, config)
    if accelerator.native_amp:
        _autocast(accelerator, model)
    # It wants an optimizer beside the model, but would lose what that keeps already.
    model, _ = accelerator.prepare(model, make_optimizer(model, config))
    return model, make_optimizer(model, config)


@contextlib.contextmanager
def gradient_sum(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one part of a step: the processes average their gradients after the last part alone.

    Until then FSDP2 keeps the weights that it has gathered: they are the same for the whole step. Processes may go through
    unequal numbers of parts, since they meet before the first and after the last of them only.
    """
    if isinstance(model, FSDPModule):
        # Not `accelerator.no_sync`: Accelerate forgets that it shards once an optimizer is prepared.
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        with warnings.catch_warnings():  # the losses are a view, which we do not write into
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield
    else:
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield


def _sharding() -> FullyShardedDataParallelPlugin:
    """FSDP2 around the model as a whole and never around f: its weights are gathered when a forward pass begins and kept
    until its backward pass is over, so that no solve waits for another process, however many evaluations it needs.

    Low precision is left to autocast, as everywhere else, since f must see the same weights forward and backward.
    """
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=False,
        auto_wrap_policy="no_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,
    )


def _autocast(accelerator: Accelerator, model: nn.Module) -> None:
    """What Accelerate does to models that it does not shard."""
    forward = model.forward

    def in_low_precision(*args: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **options)

    model.forward = convert_outputs_to_fp32(in_low_precision)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
