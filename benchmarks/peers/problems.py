"""The maps that all contenders solve, as arrays: every library gets the same numbers, and its own f on them.

A problem has `leaves`, what a gradient is taken in; `prepare`, what does not change during a solve (once per solve); and f.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equilibria.models.block import DropoutMasks, KeysValues, Memory, Positions, TransformerBlock, Weights
from equilibria.nn.affine import affine

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """z = f(z, *args), args = prepare(leaves), from z0 = 0."""

    name: str
    shape: tuple[int, ...]
    """Of z, the batch first."""
    leaves: Arrays
    budget: int
    """Most evaluations of f."""
    prepare: Callable[..., tuple[Any, ...]]
    """(library's linear map, *leaves) -> args; the same code for all."""
    batch_dims: tuple[int | None, ...]
    """Which dimension of each arg carries the batch."""
    torch_map: Callable[..., Tensor]
    """f(z, *args) of a batch."""
    jax_map: Callable[..., Any]
    """f(z, *args) of one sample."""
    numpy_map: Callable[..., np.ndarray] | None = None
    small: bool = False
    """Small enough for dense Jacobians and for a solve compiled as one graph."""

    def torch_leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(np.array(leaf)).to(dtype) for leaf in self.leaves.values())

    def torch_args(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return self.prepare(*self.torch_leaves(dtype))


# z = tanh(W z + U x + b), the weights as nn.Linear has them, which is how PyTorch multiplies fastest


def _injected(W: Any, U: Any, b: Any, x: Any) -> tuple[Any, Any]:
    return W, x @ U.T + b


def _tanh_torch(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(torch.addmm(c, z, W.t()))


def _tanh_torch_large(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
    """By oneDNN, which is twice as fast as MKL on processors of other makers than Intel."""
    return torch.tanh(affine(z, W, c))


def _tanh_jax(z: Any, W: Any, c: Any) -> Any:
    return importlib.import_module("jax.numpy").tanh(z @ W.T + c)


def _tanh_numpy(z: np.ndarray, W: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.tanh(z @ W.T + c)


def tanh(size: int, batch: int, norm: float, *, orthogonal: bool = False, uneven: bool = False) -> Problem:
    """W random with that spectral norm, or orthogonal times it; `uneven`: x of one sample is small, of all others large."""
    draw = torch.Generator().manual_seed(size + batch)
    W, U, b, x = (torch.randn(shape, generator=draw) for shape in ((size, size), (size, size), (size,), (batch, size)))
    W = torch.linalg.qr(W)[0] * norm if orthogonal else W * (norm / torch.linalg.matrix_norm(W, 2))
    W, U, b = W.t().contiguous(), U / size**0.5, 0.1 * b
    if uneven:  # a large x saturates tanh, and makes its sample easy
        x, b = x * torch.full((batch, 1), 10.0).index_fill_(0, torch.tensor([batch // 2]), 0.02), 0.0 * b
    kind = "orthogonal W" if orthogonal else "random W"
    name = f"tanh, {kind}, norm {norm:g}, d {size}, batch {batch}"
    return Problem(
        name="one hard sample among 255 easy ones, d 256" if uneven else name, shape=(batch, size),
        leaves={key: value.numpy() for key, value in (("W", W), ("U", U), ("b", b), ("x", x))}, budget=300,
        prepare=_injected, batch_dims=(None, 0), torch_map=_tanh_torch if size <= 64 else _tanh_torch_large,
        jax_map=_tanh_jax, numpy_map=_tanh_numpy, small=size <= 64,
    )  # fmt: skip


# A post-norm Transformer block with injection, as the DEQ-Transformer has it


def transformer(
    name: str, d_model: int, batch: int, length: int, memory: int = 0, std: float | None = 0.02, injection: float = 1.0
) -> Problem:
    """The block of the DEQ-Transformer with 4 heads, weights N(0, std²) or as nn.Linear draws them."""
    torch.manual_seed(0)
    block = TransformerBlock(d_model, 4, 4 * d_model, init_std=std or 0.02)
    for layer in block.modules():
        if isinstance(layer, nn.Linear) and std is None:
            layer.reset_parameters()
    past = Memory(torch.randn(batch, memory, d_model), torch.randn(batch, memory, 3 * d_model)) if memory else None
    with torch.no_grad():
        injected, kept, weights, positions, _, _ = block.prepare(injection * torch.randn(batch, length, 3 * d_model), past)
    assert positions.mask is not None
    leaves = {"injection": injected, **kept._asdict(), **weights._asdict(), **positions._asdict()}
    dims = (0, 1, 1, *(None for _ in (*weights, *positions)))

    def torch_map(z: Tensor, injection: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        known = len(weights)
        return block(
            z, injection, KeysValues(keys, values), Weights(*rest[:known]), Positions(*rest[known:]), DropoutMasks()
        )

    return Problem(
        name=name, shape=(batch, length, d_model), leaves={key: leaf.detach().numpy() for key, leaf in leaves.items()},
        budget=300, prepare=lambda *leaves: leaves, batch_dims=dims, torch_map=torch_map, jax_map=_block_jax,
    )  # fmt: skip


def _block_jax(
    z: Any, injection: Any, keys: Any, values: Any, qkv: Any, out: Any, out_bias: Any, ff_in: Any, ff_in_bias: Any,
    ff_out: Any, ff_out_bias: Any, projected: Any, bias: Any, mask: Any,
) -> Any:  # fmt: skip
    """The same block for one sample, z (L, d); see equilibria.nn.relative_attention for the shift."""
    jnp = importlib.import_module("jax.numpy")
    softmax = importlib.import_module("jax.nn").softmax
    (length, width), (heads, memory, size) = z.shape, keys.shape
    columns = memory + length
    queries, new_keys, new_values = jnp.moveaxis((z @ qkv.T + injection).reshape(length, 3, heads, size), (1, 2), (0, 1))
    keys, values = jnp.concatenate((keys, new_keys), 1), jnp.concatenate((values, new_values), 1)
    product = jnp.einsum("hle,hek->hlk", queries + bias[:, 0], projected) + mask
    shifted = product.reshape(heads, -1)[:, length:].reshape(heads, length, columns)
    weights = softmax(jnp.einsum("hle,hke->hlk", queries, keys) + shifted, axis=-1)
    attended = jnp.einsum("hlk,hke->lhe", weights, values).reshape(length, width)
    state = _layer_norm(jnp, z + attended @ out.T + out_bias)
    hidden = jnp.maximum(state @ ff_in.T + ff_in_bias, 0)
    return _layer_norm(jnp, state + hidden @ ff_out.T + ff_out_bias)


def _layer_norm(jnp: Any, x: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


SUITE: dict[str, Callable[[], Problem]] = {
    **{
        f"tanh-{norm}-{size}-{batch}": lambda size=size, batch=batch, norm=norm: tanh(size, batch, norm)
        for size in (64, 1024) for norm in (0.9, 1.5) for batch in (1, 32, 256)
    },
    **{f"orthogonal-{size}": lambda size=size: tanh(size, 32, 1.2, orthogonal=True) for size in (64, 1024)},
    "uneven": lambda: tanh(256, 256, 0.95, orthogonal=True, uneven=True),
    "lm-128": lambda: transformer("LM block, d_model 128, memory 64, batch 16", 128, 16, 64, 64, injection=4.0),
    "lm-512": lambda: transformer("LM block, d_model 512, memory 150, batch 8", 512, 8, 64, 150, injection=4.0),
    "block-default": lambda: transformer("block, weights as nn.Linear draws them", 128, 16, 64, std=None),
    "block-0.02": lambda: transformer("block, weights N(0, 0.02²)", 128, 16, 64),
    "block-0.05": lambda: transformer("block, weights N(0, 0.05²)", 128, 16, 64, std=0.05),
}  # fmt: skip
"""Short name, for `--only`, -> problem."""
