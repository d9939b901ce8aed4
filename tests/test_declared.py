"""Nothing loses its gradient silently, f is deterministic, and args are what they should be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from equilibria import Implicit, Phantom, RandomMapError, Stopping, UndeclaredTensorError, Unrolled, fixed_point
from equilibria.nn.dropout import FrozenDropout

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-14, max_evals=200)
X = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.0, -1.0]])
Z0 = torch.zeros(2, 3)
shared_weight = torch.full((3,), 0.4, requires_grad=True)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        nn.init.constant_(self.inner.weight, 0.1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)

    def other_name(self, z: Tensor, x: Tensor) -> Tensor:
        return self(z, x)


class Holder:
    """No module: its tensors do not count as passed."""

    def __init__(self) -> None:
        self.scale = torch.full((3,), 0.4, requires_grad=True)

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        return self.scale * z + x

    def method(self, z: Tensor, x: Tensor) -> Tensor:
        return self.scale * z + x


class Stray(Cell):
    """A module with a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stray = torch.full((3,), 0.4, requires_grad=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x) * self.stray


def weight() -> Tensor:
    return torch.full((3,), 0.4, requires_grad=True)


def closure_leaf() -> Callable[..., Tensor]:
    leaf = weight()
    return lambda z, x: leaf * z + x


def closure_nonleaf() -> Callable[..., Tensor]:
    product = weight() * 0.5
    return lambda z, x: product * z + x


def closure_list() -> Callable[..., Tensor]:
    weights = {"scales": [torch.ones(3), weight()]}
    return lambda z, x: weights["scales"][1] * z + x


def closure_module() -> Callable[..., Tensor]:
    cell = Cell()
    return lambda z, x: cell(z, x)


def default_argument() -> Callable[..., Tensor]:
    def f(z: Tensor, x: Tensor, hidden: Tensor = weight()) -> Tensor:  # noqa: B008
        return hidden * z + x

    return f


def uses_global(z: Tensor, x: Tensor) -> Tensor:
    return shared_weight * z + x


def partial() -> Callable[..., Tensor]:
    return functools.partial(lambda w, z, x: w * z + x, weight())


def partial_keyword() -> Callable[..., Tensor]:
    return functools.partial(lambda z, x, w: w * z + x, w=weight())


def partial_of_closure() -> Callable[..., Tensor]:
    leaf = weight()
    return functools.partial(lambda k, z, x: k * leaf * z + x, 0.5)


def hidden_deep() -> Callable[..., Tensor]:
    leaf = weight()

    def inner(z: Tensor) -> Tensor:
        return leaf * z

    return lambda z, x: inner(z) + x


UNDECLARED: dict[str, tuple[Callable[[], Callable[..., Tensor]], str]] = {
    "closure leaf": (closure_leaf, "`leaf` of shape (3,)"),
    "closure non-leaf": (closure_nonleaf, "`product` of shape (3,)"),
    "closure list": (closure_list, "`weights['scales'][1]` of shape (3,)"),
    "module captured in a lambda": (closure_module, "`cell.inner.weight` of shape (3, 3)"),
    "default argument": (default_argument, "`default argument` of shape (3,)"),
    "global": (lambda: uses_global, "`shared_weight` of shape (3,)"),
    "partial": (partial, "`partial argument 0` of shape (3,)"),
    "partial keyword": (partial_keyword, "`partial argument 0` of shape (3,)"),
    "partial of a closure": (partial_of_closure, "`leaf` of shape (3,)"),
    "callable object": (Holder, "`self.scale` of shape (3,)"),
    "bound method": (lambda: Holder().method, "`self.scale` of shape (3,)"),
    "stray tensor of a module": (Stray, "`self.stray` of shape (3,)"),
    "out of sight": (hidden_deep, "a tensor of shape (3,)"),
}


@pytest.mark.parametrize("kind", UNDECLARED)
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(steps=2)], ids=["implicit", "phantom"])
class TestUndeclared:
    def test_raises_and_names_it(self, kind: str, adjoint: Any) -> None:
        make, name = UNDECLARED[kind]
        with pytest.raises(UndeclaredTensorError) as caught:
            fixed_point(make(), Z0, X, adjoint=adjoint)
        assert f"f uses {name}" in str(caught.value)
        assert "Pass it in args" in str(caught.value)

    def test_not_under_no_grad(self, kind: str, adjoint: Any) -> None:
        f = UNDECLARED[kind][0]()
        with torch.no_grad():
            assert fixed_point(f, Z0, X, adjoint=adjoint).stats.converged.all()

    def test_not_with_unrolled(self, kind: str, adjoint: Any) -> None:
        """Autograd records the steps themselves, so that every tensor gets its gradient."""
        z, _ = fixed_point(UNDECLARED[kind][0](), Z0, X, adjoint=Unrolled())
        assert z.requires_grad


def test_names_all_of_them() -> None:
    a, b, c = weight(), weight(), weight()
    with pytest.raises(UndeclaredTensorError, match=r"`a` of shape \(3,\), `b` of shape \(3,\), which"):
        fixed_point(lambda z, x, c: a * b * c * z + x, Z0, X, c)


def test_passed_tensors_of_any_kind_are_fine() -> None:
    a = weight()
    nonleaf = a * 0.5
    frozen = torch.ones(3)
    z, _ = fixed_point(lambda z, w, d: (w * z + d["x"][0]) * frozen, Z0, nonleaf, {"x": (X, None)})
    (gradient,) = torch.autograd.grad(z.sum(), a)
    assert gradient.abs().min() > 0


def test_an_unbound_name_does_not_hide_another() -> None:
    """The closure of f holds a cell that is still empty when the error is made up."""
    w = weight()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return w * z + x if len(z) else later

    with pytest.raises(UndeclaredTensorError, match=r"f uses `w` of shape \(3,\), which"):
        fixed_point(f, Z0, X)
    later = X


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
@pytest.mark.parametrize("grad", [True, False])
class TestWritesIntoItsState:
    def test_a_tensor(self, adjoint: Any, grad: bool) -> None:
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"f writes into its argument z.*z \* 0.5"):
            fixed_point(lambda z, x: z.mul_(0.5).add_(x), Z0.clone(), X, adjoint=adjoint)

    def test_a_part_of_a_structure(self, adjoint: Any, grad: bool) -> None:
        def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            z["c"][:, 0] = 1.0
            return {"h": 0.5 * z["h"] + x, "c": torch.cos(z["c"])}

        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="f writes into its argument z"):
            fixed_point(f, {"h": Z0, "c": torch.zeros(2, 2)}, X, adjoint=adjoint)

    def test_its_own_tensors_may_be_written_to(self, adjoint: Any, grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            assert fixed_point(lambda z, x: (0.5 * z).add_(x), Z0, X, adjoint=adjoint).stats.converged.all()


def test_a_detached_tensor_is_fine() -> None:
    a = weight()
    assert fixed_point(lambda z, x: a.detach() * z + x, Z0, X).stats.converged.all()


@pytest.mark.parametrize("f", [Cell(), Cell().other_name, Cell().forward], ids=["module", "method", "forward"])
def test_a_module_owns_its_parameters(f: Any) -> None:
    z, _ = fixed_point(f, Z0, X)
    assert z.requires_grad


class TestUndeclaredInTransforms:
    """Under torch.func, and in forward mode, a tensor carries derivatives without requires_grad."""

    def solve(self, w: Tensor) -> Tensor:
        return fixed_point(lambda z, x: w * z + x, Z0, X).z.sum()

    def test_func_grad(self) -> None:
        with pytest.raises(UndeclaredTensorError, match=r"`w` of shape \(3,\)"):
            torch.func.grad(self.solve)(weight().detach())

    def test_func_jvp(self) -> None:
        with pytest.raises(UndeclaredTensorError):
            torch.func.jvp(self.solve, (weight().detach(),), (torch.ones(3),))

    @pytest.mark.parametrize("grad", [True, False])
    def test_dual_number(self, grad: bool) -> None:
        """torch.no_grad() switches off reverse mode alone."""
        with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(UndeclaredTensorError):
            self.solve(forward_ad.make_dual(weight().detach(), torch.ones(3)))

    def test_vmap_of_grad(self) -> None:
        with pytest.raises(UndeclaredTensorError):
            torch.vmap(torch.func.grad(self.solve))(weight().detach().expand(4, 3))

    def test_parameter_inside_vmap(self) -> None:
        w = weight()
        with pytest.raises(UndeclaredTensorError):
            torch.vmap(lambda x: fixed_point(lambda z, x: w * z + x, torch.zeros(1, 3), x[None]).z)(X)

    def test_parameter_inside_func_grad(self) -> None:
        w = weight()
        with pytest.raises(UndeclaredTensorError):
            torch.func.grad(lambda x: fixed_point(lambda z, x: w * z + x, Z0, x).z.sum())(X)

    @pytest.mark.parametrize("outer", [torch.func.grad, torch.func.jacfwd])
    @pytest.mark.parametrize("inner", [torch.func.grad, torch.func.jacfwd])
    def test_outer_of_two_transforms(self, outer: Any, inner: Any) -> None:
        """b is passed; w belongs to the outer transform alone."""

        def of_w(w: Tensor) -> Tensor:
            return inner(lambda b: fixed_point(lambda z, b: torch.tanh(w * z + b), Z0, b).z.sum())(X).sum()

        with pytest.raises(UndeclaredTensorError):
            outer(of_w)(weight().detach())

    @pytest.mark.parametrize("outer", [torch.func.grad, torch.func.jacfwd])
    def test_outside_of_vmap(self, outer: Any) -> None:
        def of_w(w: Tensor) -> Tensor:
            return torch.vmap(lambda x: fixed_point(lambda z, x: w * z + x, torch.zeros(1, 3), x[None]).z)(X).sum()

        with pytest.raises(UndeclaredTensorError):
            outer(of_w)(weight().detach())


def one_level(outer: Any) -> Any:
    return lambda body, w: outer(lambda w: body(w, X))(w)


def over_vmap(outer: Any) -> Any:
    return lambda body, w: outer(lambda w: torch.vmap(lambda x: body(w, x[None]))(X).sum())(w)


def under_vmap(outer: Any) -> Any:
    return lambda body, w: torch.vmap(outer(lambda w: body(w, X)))(torch.stack((w, 0.5 * w)))


def two_levels(outer: Any, inner: Any) -> Any:
    return lambda body, w: outer(lambda w: inner(lambda x: body(w, x))(X).sum())(w)


OPERATORS = {"grad": torch.func.grad, "jacfwd": torch.func.jacfwd, "jacrev": torch.func.jacrev}
COMPOSITIONS: dict[str, Any] = {
    "vmap": lambda body, w: torch.vmap(lambda x: body(w, x[None]))(X),
    **{name: one_level(op) for name, op in OPERATORS.items()},
    **{f"{name} of vmap": over_vmap(op) for name, op in OPERATORS.items()},
    **{f"vmap of {name}": under_vmap(op) for name, op in OPERATORS.items()},
    **{f"{a} of {b}": two_levels(OPERATORS[a], OPERATORS[b]) for a in OPERATORS for b in OPERATORS},
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("adjoint", [Implicit(stopping=TIGHT), Phantom()], ids=["implicit", "phantom"])
class TestEveryLevelOfTransforms:
    """z = w z + x, for a w that belongs to the outermost transform, or to autograd outside of all."""

    def test_a_tensor_of_the_outermost_level_is_found(self, composition: str, adjoint: Any) -> None:
        w = weight().detach() if composition != "vmap" else weight()  # a batch alone has no derivatives to lose

        def body(w: Tensor, x: Tensor) -> Tensor:
            return fixed_point(lambda z, x: w * z + x, torch.zeros(len(x), 3), x, adjoint=adjoint).z.sum()

        with pytest.raises(UndeclaredTensorError):
            COMPOSITIONS[composition](body, w)

    def test_a_parameter_from_outside_is_found(self, composition: str, adjoint: Any) -> None:
        leaf = weight()

        def body(w: Tensor, x: Tensor) -> Tensor:
            return fixed_point(lambda z, x, w: leaf * w * z + x, torch.zeros(len(x), 3), x, w, adjoint=adjoint).z.sum()

        with pytest.raises(UndeclaredTensorError):
            COMPOSITIONS[composition](body, weight().detach())

    def test_what_is_passed_is_differentiated(self, composition: str, adjoint: Any) -> None:
        w = weight().detach().double()

        def body(w: Tensor, x: Tensor) -> Tensor:
            z0 = torch.zeros(len(x), 3).double()
            return fixed_point(lambda z, x, w: w * z + x, z0, x.double(), w, stopping=TIGHT, adjoint=adjoint).z.sum()

        def exact(w: Tensor, x: Tensor) -> Tensor:
            z = (x.double() / (1 - w)).detach() if isinstance(adjoint, Phantom) else x.double() / (1 - w)
            return (w * z + x.double()).sum()

        if composition == "jacfwd of jacfwd" and isinstance(adjoint, Implicit):
            with pytest.raises(NotImplementedError, match="forward mode inside forward mode"):
                COMPOSITIONS[composition](body, w)
        else:
            assert torch.allclose(COMPOSITIONS[composition](body, w), COMPOSITIONS[composition](exact, w), rtol=1e-9)


class TestRandomness:
    @pytest.mark.parametrize(
        "f",
        [
            lambda z: F.dropout(z + 1, 0.5),
            lambda z: 0.5 * z + torch.rand(2, 3),
            lambda z: 0.5 * z + torch.randn_like(z),
            lambda z: torch.bernoulli(torch.sigmoid(z)),
        ],
        ids=["F.dropout", "rand", "randn_like", "bernoulli"],
    )
    @pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
    @pytest.mark.parametrize("grad", [True, False])
    def test_a_random_map_raises(self, f: Any, adjoint: Any, grad: bool) -> None:
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RandomMapError, match=r"random numbers.*pass them in args.*FrozenDropout"),
        ):
            fixed_point(f, Z0, adjoint=adjoint)

    @pytest.mark.parametrize(
        "layer", [nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3)], ids=lambda layer: type(layer).__name__
    )
    def test_dropout_inside_a_module_is_refused_in_training_alone(self, layer: nn.Module) -> None:
        f = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), layer))
        nn.init.constant_(f[0].weight, 0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        name = type(layer).__name__
        for solvable in (f, f.forward):
            with pytest.raises(RandomMapError, match=rf"{name}\(p=0.3\) at 1.1, .*equilibria.nn.FrozenDropout"):
                fixed_point(solvable, Z0)
        assert fixed_point(f.eval(), Z0).stats.converged.all()

    def test_dropout_of_nothing_is_no_dropout(self) -> None:
        f = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))
        nn.init.constant_(f[0].weight, 0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert fixed_point(f, Z0).stats.converged.all()

    def test_a_mask_passed_in_args_is_frozen(self) -> None:
        torch.manual_seed(0)
        drop = FrozenDropout(0.5)
        x = X.clone().requires_grad_()
        mask = drop.mask(x)
        f = lambda z, x, mask: torch.tanh(0.5 * drop(z, mask) + x)  # noqa: E731
        z, stats = fixed_point(f, Z0, x, mask)
        assert stats.converged.all()
        z.sum().backward()
        assert x.grad is not None

    def test_a_solve_draws_nothing(self) -> None:
        before = torch.get_rng_state()
        x = X.clone().requires_grad_()
        fixed_point(lambda z, x: torch.tanh(0.5 * z + x), Z0, x).z.sum().backward()
        assert torch.equal(before, torch.get_rng_state())


class TestArgs:
    def test_a_module_is_refused(self) -> None:
        cell = Cell()
        with pytest.raises(TypeError, match=r"args hold the module Cell; pass tensors, or make f a module that owns it"):
            fixed_point(lambda z, x, m: m(z, x), Z0, X, cell)
        with pytest.raises(TypeError, match="args hold the module Cell"):
            fixed_point(lambda z, x, m: m["cell"](z, x), Z0, X, {"cell": cell})

    @pytest.mark.parametrize("f", [3, None, "tanh", X])
    def test_f_must_be_callable(self, f: Any) -> None:
        with pytest.raises(TypeError, match=rf"f is a {type(f).__name__}; give a function z, \*args -> z or an nn.Module"):
            fixed_point(f, Z0, X)

    @pytest.mark.parametrize(
        ("batch_dims", "words"),
        [
            ((0,), ["batch_dims has 1 entries for 2 args", "one per arg"]),
            ((0, None, 0), ["batch_dims has 3 entries for 2 args"]),
            ((), ["batch_dims has 0 entries for 2 args"]),
            ((1, None), ["batch_dims[0] = 1", "shape (2, 3)", "batch of 2", "None for an arg without the batch"]),
            ((2, None), ["batch_dims[0] = 2", "shape (2, 3)"]),
            ((-3, None), ["batch_dims[0] = -3", "shape (2, 3)"]),
            ((0, 0), ["batch_dims[1] = 0", "args[1] holds a tensor of shape (3,)"]),
        ],
    )
    def test_wrong_batch_dims(self, batch_dims: Any, words: list[str]) -> None:
        with pytest.raises(ValueError, match="batch_dims") as caught:
            fixed_point(lambda z, x, d: 0.5 * z + x + d["w"], Z0, X, {"w": torch.ones(3), "k": 1}, batch_dims=batch_dims)
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize("dim", [0, -2])
    def test_constants_and_structures_go_through(self, dim: int) -> None:
        seen = []

        def f(z: Tensor, x: Tensor, options: dict[str, Any], nothing: None, number: float) -> Tensor:
            seen.append((options["name"], options["index"].dtype, options["mask"].dtype, nothing, number))
            return number * z + options["pair"][0] * x * options["mask"] + options["index"]

        options = {"name": "abc", "pair": (X,), "index": torch.arange(3), "mask": torch.tensor([True, False, True])}
        z, stats = fixed_point(f, Z0, X, options, None, 0.5, batch_dims=(dim, None, None, None))
        assert torch.allclose(z, 2 * (X * X * options["mask"] + options["index"]), rtol=2e-3)
        assert stats.converged.all()
        assert set(seen) == {("abc", torch.int64, torch.bool, None, 0.5)}


class Tied(nn.Module):
    """One weight in two modules, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3, bias=False).double()
        self.second.weight = self.first.weight
        self.alias = self.first

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.2 * self.alias(self.second(self.first(z))) + x)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
def test_tied_weights_stay_those_of_the_module(adjoint: Any) -> None:
    """And receive the sum of the gradients of their uses."""
    torch.manual_seed(0)
    module, x = Tied(), torch.randn(2, 3).double()
    before = dict(module.named_parameters(remove_duplicate=False))
    z = fixed_point(module, torch.zeros_like(x), x, stopping=Stopping(rtol=1e-13, max_evals=100), adjoint=adjoint).z
    z.square().sum().backward()
    after = dict(module.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    if isinstance(adjoint, Phantom):
        return
    weight = module.first.weight
    step = 1e-6
    for i in range(3):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, 0] += sign * step
                z = fixed_point(module, torch.zeros_like(x), x, stopping=Stopping(rtol=1e-14, max_evals=100)).z
                losses.append(float(z.square().sum()))
                weight[i, 0] -= sign * step
        assert weight.grad is not None
        assert float(weight.grad[i, 0]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3)], ids=["BatchNorm1d", "SyncBatchNorm"])
def test_batch_norm_in_training_mode_is_refused(norm: nn.Module) -> None:
    """It ties each sample to its batch, and its running statistics move at every evaluation."""
    f = nn.Sequential(nn.Linear(3, 3), norm)
    with pytest.raises(ValueError, match=r"BatchNorm.* in training mode at 1.*use LayerNorm or GroupNorm, or call eval"):
        fixed_point(f, torch.zeros(4, 3))
    if isinstance(norm, nn.BatchNorm1d):
        fixed_point(f.eval(), torch.zeros(4, 3), raise_nonfinite=False)
