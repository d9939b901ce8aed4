"""What torch.compile made of a function. The only file that looks inside the compiler: torch has no public way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config

from equilibria.transforms import nodes_behind


def source(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function that f was compiled from, or f."""
    return getattr(f, "_torchdynamo_orig_callable", f)


def recorded_to_stay(record: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], AbstractContextManager[Any]]]:
    """(record(), context), where any number of backward passes over what is recorded may run, each inside `context()`.

    A compiled function may donate what it recorded to the first pass over it, which overwrites it. Compiled here it is told
    not to; what was compiled before, elsewhere, is run as it was written.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return record(), nullcontext
    with _keeping():
        output = record()
    compiled = [node for node in nodes_behind(output) if type(node).__name__ == "CompiledFunctionBackward"]
    if not compiled:
        return output, nullcontext
    if any(map(_donates, compiled)):
        with as_written():
            return record(), nullcontext
    return output, _keeping  # without it the compiler refuses, for it does not remember what it was told


def as_written() -> AbstractContextManager[Any]:
    """Run compiled parts of f uncompiled: what torch.compile makes cannot be differentiated twice."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():  # nothing is compiled, or all is
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _keeping() -> AbstractContextManager[Any]:
    return config.patch(donated_buffer=False)  # pyright: ignore[reportAttributeAccessIssue]


def _donates(node: Any) -> bool:
    try:
        return bool(node._forward_cls.metadata.bw_donated_idxs)
    except AttributeError:  # another version of the compiler: nothing is known
        return True
