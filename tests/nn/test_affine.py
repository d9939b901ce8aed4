from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn import affine as module
from equilibria.nn import affine_in_graph
from equilibria.nn.affine import affine, affine_relu

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode
wide = pytest.mark.skipif(not module.WIDE, reason="this machine's products are PyTorch's own")


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that were made besides PyTorch's own."""
    made: list[tuple[int, ...]] = []
    usual = module.product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
        made.append((*x.shape, len(weight)))
        return usual(x, weight, bias, then)

    monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(affine_in_graph, "product", product)
    return made


def tensors(bias: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    shapes = {"row": (3,), "full": (2, 5, 3)}
    return (x, weight, torch.randn(shapes[bias], requires_grad=True)) if bias in shapes else (x, weight)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight) if bias is None else F.linear(x, weight) + bias


def plain_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias).relu()


@pytest.mark.parametrize(
    ("ours", "usual", "bias"),
    [(affine, plain, "none"), (affine, plain, "row"), (affine, plain, "full"), (affine_relu, plain_relu, "row")],
)
def test_values_and_derivatives_are_those_of_a_linear_map(ours: Any, usual: Any, bias: str) -> None:
    args = tensors(bias)
    found, expected = [], []
    for f, kept in ((ours, found), (usual, expected)):
        y = f(*args)
        first = torch.autograd.grad(y.square().sum(), args, create_graph=True)
        second = torch.autograd.grad(torch.cat([t.flatten() for t in first]).square().sum(), args)
        kept += [y, *first, *second]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@wide
def test_a_product_with_the_weights_is_made_only_where_it_is_asked_for(products: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors("row")
    for leaf in (True, False):
        y = affine(*((x, weight, bias) if leaf else (x * 1, weight * 1, bias * 1)))
        for wanted, made in ((x, [(10, 3, 7)]), (weight, [(3, 10, 7)]), (bias, [])):
            products.clear()
            torch.autograd.grad(y.sum(), wanted, retain_graph=True)
            assert products == made
        products.clear()
        y.sum().backward()
        assert products == [(10, 3, 7), (3, 10, 7)]


@wide
def test_transforms_precision_and_other_types_take_the_usual_way(products: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors("row")
    torch.func.vmap(affine, (0, None, None))(x, weight, bias)
    torch.func.jvp(lambda x: affine(x, weight, bias), (x,), (x,))
    affine(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert affine(x, weight, bias).dtype == torch.bfloat16
    with torch.device("meta"):
        layer = nn.Linear(7, 3)
    affine(torch.empty(2, 7, device="meta"), layer.weight, layer.bias)
    assert not products
    affine(x, weight, bias)
    assert products


@wide
def test_a_batch_of_gradients_at_once() -> None:
    x, weight, bias = tensors("row")
    y = affine(x, weight, bias)
    many = torch.randn(4, *y.shape)
    found = torch.autograd.grad(y, x, many, is_grads_batched=True)[0]
    torch.testing.assert_close(found, many @ weight)
    y = affine_relu(x, weight, bias)
    found = torch.autograd.grad(y, x, many, is_grads_batched=True)[0]
    torch.testing.assert_close(found, (many * (y > 0)) @ weight)


@wide
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from here on: of the compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestInGraph:
    """Traced by torch.compile."""

    @pytest.mark.parametrize(("ours", "bias"), [(affine, "none"), (affine, "row"), (affine, "full"), (affine_relu, "row")])
    def test_values_and_gradients_are_the_same(self, ours: Any, bias: str, products: list[tuple[int, ...]]) -> None:
        args = tensors(bias)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        pairs = []
        for f in (compiled, ours):
            products.clear()
            y = f(*args)
            pairs.append([y, *torch.autograd.grad(y.square().sum(), args)])
            assert len(products) == 3
        torch.testing.assert_close(*pairs)

    @pytest.mark.parametrize("bias", ["none", "row", "full"])
    def test_a_vjp_inside_the_graph_has_the_gradient_of_every_input(self, bias: str) -> None:
        args = [t.detach() for t in tensors(bias)]

        def pulled(*args: Tensor) -> tuple[Tensor, ...]:
            y, pull, *_ = torch.func.vjp(affine, *args)
            return pull(y)

        torch.testing.assert_close(torch.compile(pulled, fullgraph=True, backend="aot_eager")(*args), pulled(*args))

    def test_transforms_and_exports_take_the_usual_way(self, products: list[tuple[int, ...]]) -> None:
        x, weight, bias = (t.detach() for t in tensors("row"))
        for f in (
            lambda x: torch.vmap(affine, (0, None, None))(x, weight, bias),
            lambda x: torch.func.jvp(lambda x: affine(x, weight, bias), (x,), (x,))[1],
        ):
            torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
        pull = lambda x: torch.func.vjp(lambda x: affine(x, weight, bias), x)[1](x[..., :3])[0]  # noqa: E731
        assert not products
        torch.testing.assert_close(torch.compile(pull, fullgraph=True, backend="aot_eager")(x), pull(x))
        assert products

        class Layer(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return affine(x, weight, bias)

        program = torch.export.export(Layer(), (x,))
        assert "equilibria" not in str(program.graph)


@wide
def test_a_relu_is_part_of_the_product(products: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors("row")
    with torch.no_grad():
        torch.testing.assert_close(affine_relu(x, weight, bias), F.linear(x, weight, bias).relu(), rtol=1e-5, atol=1e-5)
    assert products == [(10, 7, 3)]
