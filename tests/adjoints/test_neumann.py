"""The Neumann series: exactly its terms, in every mode of differentiation."""

from __future__ import annotations

import pytest
import torch
from problems import Counted, affine_map, normal, normal_matrix, orthogonal, tanh_map
from torch import Tensor

from equilibria import Implicit, Neumann, Phantom, Stopping, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
TIGHT = Stopping(rtol=1e-14, atol=1e-15, max_evals=200)
A = normal_matrix(torch.tensor([0.9, -0.5, 0.2]))
W = 0.6 * orthogonal(3)
X = normal(0, 2, 3)


def solve(terms: int, W: Tensor, x: Tensor) -> Tensor:
    return fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=TIGHT, adjoint=Neumann(terms=terms)).z


@pytest.mark.parametrize("terms", [1, 2, 3, 10])
def test_is_the_truncated_series(terms: int) -> None:
    b = normal(0, 2, 3).requires_grad_()
    z, stats = fixed_point(affine_map, torch.zeros(2, 3).double(), A, b, stopping=TIGHT, adjoint=Neumann(terms=terms))
    g = normal(1, 2, 3)
    found = torch.autograd.grad(z, b, g)[0]
    series = torch.stack([g @ torch.linalg.matrix_power(A, i) for i in range(terms)]).sum(0)
    assert torch.allclose(found, series, rtol=1e-11)
    assert stats.backward == []


def test_error_shrinks_as_the_spectral_radius() -> None:
    b = normal(0, 2, 3).requires_grad_()

    def gradient(adjoint: Neumann | Implicit) -> Tensor:
        z = fixed_point(affine_map, torch.zeros(2, 3).double(), A, b, stopping=TIGHT, adjoint=adjoint).z
        return torch.autograd.grad(z.sum(), b)[0]

    exact = gradient(Implicit(stopping=TIGHT))
    errors = [float((gradient(Neumann(terms=terms)) - exact).norm()) for terms in (40, 41)]
    assert errors[1] / errors[0] == pytest.approx(0.9, rel=1e-6)


def test_equals_phantom_with_as_many_steps() -> None:
    """At a converged z* all steps of Phantom have the same Jacobian; Neumann holds one record for all."""
    leaf = W.clone().requires_grad_()
    for terms in (1, 2, 5):
        z = fixed_point(tanh_map, torch.zeros_like(X), leaf, X, stopping=TIGHT, adjoint=Phantom(steps=terms)).z
        (other,) = torch.autograd.grad(z.sum(), leaf)
        (one,) = torch.autograd.grad(solve(terms, leaf, X).sum(), leaf)
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_costs_one_record_and_a_product_for_each_further_term() -> None:
    f = Counted(lambda z, x: 0.5 * z + x)
    x = torch.ones(2, 3, requires_grad=True)
    z, stats = fixed_point(f, torch.zeros(2, 3), x, adjoint=Neumann(terms=7))
    z.sum().backward()
    assert f.calls == stats.evaluations + 1


def test_transforms_agree_with_plain_autograd() -> None:
    leaf = W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(solve(3, leaf, X).sum(), leaf)
    assert torch.allclose(torch.func.grad(lambda W: solve(3, W, X).sum())(W), expected, rtol=1e-12)
    v = normal(3, 3, 3)
    tangent = torch.func.jvp(lambda W: solve(3, W, X).sum(), (W,), (v,))[1]
    assert torch.allclose(tangent, (expected * v).sum(), rtol=1e-12)
    (graphed,) = torch.autograd.grad(solve(3, leaf, X).sum(), leaf, create_graph=True)
    assert torch.allclose(graphed, expected, rtol=1e-12)


def test_many_terms_have_the_second_derivative_of_implicit() -> None:
    def hessian(adjoint: Neumann | Implicit) -> Tensor:
        def loss(W: Tensor) -> Tensor:
            return fixed_point(tanh_map, torch.zeros_like(X), W, X, stopping=TIGHT, adjoint=adjoint).z.square().sum()

        return torch.func.hessian(loss)(W)

    assert torch.allclose(hessian(Neumann(terms=60)), hessian(Implicit(stopping=TIGHT)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("terms", [0, -1, 1.5])
def test_refuses_no_terms(terms: float) -> None:
    with pytest.raises(ValueError, match=r"Neumann\(terms=.*\): terms must be an integer >= 1"):
        Neumann(terms=terms)  # type: ignore[arg-type]
