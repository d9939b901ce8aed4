"""How the compiler is to treat a graph that holds a solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo import assume_constant_result
from torch._dynamo.callback import callback_handler
from torch._functorch import config
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.compiler import is_exporting
from torch.fx import Graph

from equilibria.graph import hoist, unread, while_loop


class LeanLoops(CustomGraphPass):
    """A pass over a graph of PyTorch's compiler, after which its loops do no more than they must."""

    def __call__(self, graph: Graph) -> None:
        unread.drop_unread(graph)
        hoist.hoist(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(tuple(part.__file__ for part in (hoist, unread, while_loop)))


@assume_constant_result  # so it runs while the graph is traced, not in the graph
def set_for_this_graph() -> bool:
    """Until the compiler has ended: no donated buffers, and loops that do no more than they must.

    PyTorch 2.13 takes the numbers of donated inputs of a backward graph for those of inputs of the loops inside it as well.
    A loop then overwrites what others still read, and the gradients are wrong.

    Loops are changed where both directions are still one graph, so that they share what is taken out of their loops. A pass
    of the user's own is left in that place.
    """
    if is_exporting():
        return False
    if _of_autograd.donated_buffer:
        _until_the_end(_of_autograd, "donated_buffer", False)
    if _of_inductor.joint_custom_post_pass is None:
        _until_the_end(_of_inductor, "joint_custom_post_pass", _lean)
    return True


_of_autograd: Any = config
_of_inductor: Any = inductor
_lean = LeanLoops()
_undo: list[Callable[[], None]] = []


def _until_the_end(options: Any, name: str, value: object) -> None:
    before = getattr(options, name)
    setattr(options, name, value)
    _undo.append(lambda: setattr(options, name, before))
    if _restore not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_restore)


def _restore(_: Any) -> None:
    while _undo:
        _undo.pop()()
