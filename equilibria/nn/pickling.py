"""Whole modules with parametrised tensors, copied or in a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from equilibria.nn.computed_once import parametrizations_of


def make_picklable(module: nn.Module) -> None:
    """Let the parametrised modules inside `module` be pickled, and copied so that copy and original are independent.

    torch puts each of them into a class of its own. That class refuses to be pickled, and is shared with copies, so that
    `remove_parametrizations` on a copy breaks the original. Here the class learns how it is built again.
    """
    for child in module.modules():
        if parametrizations_of(child):
            own = type(child)
            own.__reduce_ex__ = _reduce  # pyright: ignore[reportAttributeAccessIssue]
            if "__deepcopy__" in vars(own):
                del own.__deepcopy__  # pyright: ignore[reportAttributeAccessIssue]


def _reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
    names = list(parametrizations_of(module))
    # The class it had before: the nearest that computes none of these names.
    classes = type(module).__mro__
    plain: Any = next(c for c in classes if not any(isinstance(getattr(c, name, None), property) for name in names))
    state = dict(plain.__getstate__(module))
    # torch's weight_norm leaves a local function there, to translate the names in state dicts of its older form.
    hooks = state["_load_state_dict_pre_hooks"].items()
    kept = {key: hook for key, hook in hooks if getattr(hook, "hook", hook).__module__ != torch_parametrizations.__name__}
    state["_load_state_dict_pre_hooks"] = OrderedDict(kept)
    return _rebuild, (plain, names), state


def _rebuild(plain: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """A parametrised module of this class, still without its state."""
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    for name in names:
        module.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    return module
