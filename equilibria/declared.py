"""f as a pure function of explicit tensors: the flat state, the tensors in `args`, the parameters of a module.

Everything a gradient can flow to becomes an input, so that the adjoints deal with functions of tensors and nothing else.
What f uses without declaring it would lose its gradient; it is found here, and named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from equilibria.compiled import source
from equilibria.solution import RandomMapError, UndeclaredTensorError
from equilibria.structure import Layout
from equilibria.transforms import carries_derivatives, nodes_behind, without_derivatives


class Declared:
    """The map z, *tensors -> f(z, *args) on flat states (B, D), and the tensors it is to be called with."""

    def __init__(
        self,
        f: Callable[..., Any],
        layout: Layout,
        args: Sequence[Any],
        batch_dims: Sequence[int | None] | None,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f is a {type(f).__name__}; give a function z, *args -> z or an nn.Module")
        self.f = f
        self.layout = layout
        self.autocast = autocast_now(layout.device)
        self.module = _module_of(f)
        if self.module is not None and (f is self.module or getattr(f, "__func__", None) is type(self.module).forward):
            _refuse_layers(self.module)  # any other method need not use all that its module owns
        leaves, self._spec = tree_flatten(tuple(args))
        for leaf in leaves:
            if isinstance(leaf, nn.Module):
                raise TypeError(
                    f"args hold the module {type(leaf).__name__}; pass tensors, or make f a module that owns it "
                    "(then its parameters count as passed)"
                )
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # constants
        self._plain = all(spec.is_leaf() for spec in self._spec.children())  # no arg is a structure
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._owned = [] if self.module is None else _owned(self.module)
        self.tensors: tuple[Tensor, ...] = (*(leaves[i] for i in self._places), *(owned.tensor for owned in self._owned))
        self.dims = None if batch_dims is None else self._dims_of(args, layout.batch, batch_dims)

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """(B, D) -> (B, D)"""
        args = self._args(tensors)
        state = self.layout.unpack(z)
        owned, version = tensors[len(self._places) :], _version(z)
        with self.autocast or nullcontext():
            if self.module is None or all(place.holds(value) for place, value in zip(self._owned, owned, strict=True)):
                output = self.f(state, *args)
            else:
                pairs = zip(self._owned, owned, strict=True)
                values = {f"owner.{name}": value for place, value in pairs for name in place.names}
                method = _Method(self.f, self.module)
                # Every slot is named, tied ones too; left to itself, torch would restore a slot with two names wrongly.
                output = torch.func.functional_call(method, values, (state, *args), tie_weights=False)
        if _version(z) != version:
            raise ValueError(
                "f writes into its argument z, which the solver still needs: use operations that return a new tensor, "
                "z * 0.5 instead of z.mul_(0.5), and do not return memory that the next call overwrites"
            )
        if self.autocast is not None:
            output = tree_map_only(Tensor, lambda leaf: leaf.to(self.layout.dtype), output)
        return self.layout.pack_output(output, z.shape[0])

    def _args(self, tensors: Sequence[Tensor]) -> Sequence[Any]:
        """The args of f as the user gave them, with these tensors in place."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=False):
            leaves[place] = tensor
        return leaves if self._plain else tree_unflatten(leaves, self._spec)

    def probe(self, z: Tensor, *tensors: Tensor, check_grad: bool) -> Tensor:
        """f(z0), looked at more closely than later evaluations.

        f must not draw random numbers, not write into z and, with `check_grad`, not use tensors that carry derivatives
        besides those declared: with these detached, its output would carry them too.
        """
        random = _random_states(z.device)
        inputs = tuple(map(without_derivatives, (z, *tensors))) if check_grad else (z, *tensors)
        passed = inputs[1 : 1 + len(self._places)]
        versions = list(map(_version, passed))
        output = self(*inputs)
        if list(map(_version, passed)) != versions:
            raise ValueError(
                "f writes into one of its args, so it changes at every evaluation; use operations that return a new tensor"
            )
        if _moved(random, z.device) and self._draws(*inputs):
            raise RandomMapError(
                "f draws random numbers, so it changes at every evaluation and has no fixed point; draw them once before "
                "the solve and pass them in args (for dropout: equilibria.nn.FrozenDropout, its mask drawn in prepare)"
            )
        if check_grad and carries_derivatives(output):
            names = ", ".join(_undeclared(self.f, output)) or "a tensor"
            raise UndeclaredTensorError(
                f"f uses {names}, which requires grad but is not passed: its gradient would be lost. Pass it in args, "
                "f(z, *args), or make f the nn.Module that owns it; if no gradient is wanted, detach it or solve "
                "under torch.no_grad()"
            )
        return output

    def _draws(self, z: Tensor, *tensors: Tensor) -> bool:
        """Whether the random state moves at every one of a few more evaluations: another thread may have moved it once."""
        for _ in range(3):
            random = _random_states(z.device)
            self(z, *tensors)
            if not _moved(random, z.device):
                return False
        return True

    def _dims_of(self, args: Sequence[Any], batch: int, batch_dims: Sequence[int | None]) -> list[int | None]:
        """The batch dimension of every tensor, from the one entry per arg that the user gives."""
        if not isinstance(batch_dims, Sequence):
            raise TypeError(f"batch_dims={batch_dims!r}: give a tuple with one entry per arg, such as (None, 0)")
        if len(batch_dims) != len(args):
            raise ValueError(
                f"batch_dims has {len(batch_dims)} entries for {len(args)} args; give one per arg: the dimension that "
                "carries the batch, or None"
            )
        dims: list[int | None] = []
        for i, (arg, dim) in enumerate(zip(args, batch_dims, strict=True)):
            for leaf in tree_flatten(arg)[0]:
                if not isinstance(leaf, Tensor):
                    continue
                if dim is not None and (not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != batch):
                    raise ValueError(
                        f"batch_dims[{i}] = {dim}, but args[{i}] holds a tensor of shape {tuple(leaf.shape)}, which does "
                        f"not carry the batch of {batch} there; use None for an arg without the batch"
                    )
                dims.append(dim)
        return dims + [None] * len(self._owned)


class _Method(nn.Module):
    """Calls f, which is `owner` or a bound method of it, with other parameters in place."""

    def __init__(self, f: Callable[..., Any], owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.call = (f,)  # in a tuple, where it does not count as another module

    def forward(self, *inputs: Any) -> Any:
        return self.call[0](*inputs)


def autocast_now(device: torch.device) -> torch.autocast | None:
    """The autocast mode of the solve, entered anew at each evaluation: the backward pass evaluates f outside of it.

    Without autocast's cache: a weight that was cast where no gradient is recorded would be reused where one is.
    """
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def _module_of(f: Callable[..., Any]) -> nn.Module | None:
    owner = f if isinstance(f, nn.Module) else getattr(source(f), "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class _Owned(NamedTuple):
    """A parameter or buffer of a module, with a name for each slot that holds it: tied weights have several slots."""

    tensor: Tensor
    names: list[str]
    slots: list[tuple[dict[str, Tensor | None], str]]

    def holds(self, value: Tensor) -> bool:
        """Whether the value is in place already: the caller may have put another there, as functional_call does."""
        return all(held[key] is value for held, key in self.slots)


def _owned(module: nn.Module) -> list[_Owned]:
    found: dict[int, _Owned] = {}
    seen = set()
    for name, tensor in _named(module, tied=True):
        path, _, key = name.rpartition(".")
        owner = module.get_submodule(path)
        held: Any = owner._parameters if key in owner._parameters else owner._buffers
        if (id(held), key) in seen:  # a module that is registered under two names
            continue
        seen.add((id(held), key))
        place = found.setdefault(id(tensor), _Owned(tensor, [], []))
        place.names.append(name)
        place.slots.append((held, key))
    return list(found.values())


def _named(module: nn.Module, *, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names of parameters and buffers; with `tied`, all the names that one has."""
    yield from module.named_parameters(remove_duplicate=not tied)
    yield from module.named_buffers(remove_duplicate=not tied)


def _refuse_layers(module: nn.Module) -> None:
    """Those with which f has no fixed point, or none of its own for each sample."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None):
            raise ValueError(
                f"f contains {type(child).__name__} in training mode at {name or 'its root'}, which makes a sample depend "
                "on its batch, and changes with every evaluation: use LayerNorm or GroupNorm, or call eval() on it"
            )
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            raise RandomMapError(
                f"f contains {type(child).__name__}(p={child.p}) at {name or 'its root'}, which draws a new mask at every "
                "evaluation, so there is no fixed point; use equilibria.nn.FrozenDropout, whose mask is drawn once in "
                "prepare and passed in args"
            )


def _version(z: Tensor) -> int:
    """Changes when z is written to. Inference tensors have none."""
    return 0 if z.is_inference() else z._version


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _moved(states: list[Tensor], device: torch.device) -> bool:
    return not all(map(torch.equal, states, _random_states(device)))


_EMPTY = CellType()
"""The cell of a name that is not bound yet."""


def _undeclared(f: Callable[..., Any], output: Tensor) -> Iterator[str]:
    """Names of the tensors that gave `output` its graph, as far as they can be found where f can see them."""
    nodes = set(nodes_behind(output))
    leaves: dict[int, Tensor] = {id(node.variable): node.variable for node in nodes if hasattr(node, "variable")}
    named: set[str] = set()
    for name, tensor in _visible(f):
        leaf = leaves.pop(id(tensor), None)
        if (leaf is not None or (tensor.grad_fn is not None and tensor.grad_fn in nodes)) and name not in named:
            named.add(name)
            yield f"`{name}` of shape {tuple(tensor.shape)}"
    if not named:
        for leaf in leaves.values():
            yield f"a tensor of shape {tuple(leaf.shape)}"


def _visible(f: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that f can reach without being passed them: closure, defaults, partial arguments, globals, attributes."""
    while isinstance(f, functools.partial):
        for i, value in enumerate((*f.args, *f.keywords.values())):
            yield from _tensors_in(f"partial argument {i}", value)
        f = f.func
    f = source(f)
    function = getattr(f, "__func__", f)
    code = getattr(function, "__code__", None)
    if code is not None:
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if cell != _EMPTY:
                yield from _tensors_in(name, cell.cell_contents)
        for value in function.__defaults__ or ():
            yield from _tensors_in("default argument", value)
        for name in code.co_names:
            if name in function.__globals__:
                yield from _tensors_in(name, function.__globals__[name])
    owner = getattr(f, "__self__", f)
    for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
        yield from _tensors_in(f"self.{name}", value)


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for inner, tensor in _named(value):
            yield f"{name}.{inner}", tensor
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors_in(f"{name}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", item)
    elif hasattr(value, "__dict__") and not callable(value) and name == "self":
        for inner, item in vars(value).items():
            yield from _tensors_in(f"{name}.{inner}", item)
