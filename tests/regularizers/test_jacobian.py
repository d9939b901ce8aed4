"""The Jacobian loss against Jacobians that are known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import PROBLEMS, jacobian, normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import Picard, RandomMapError, Stopping, fixed_point
from equilibria.models import DEQTransformerLM, TransformerConfig
from equilibria.regularizers import JacobianSchedule, jacobian_loss

TIGHT = Stopping(rtol=1e-14, atol=1e-14, max_evals=500)


def linear(z: Tensor, a: Tensor) -> Tensor:
    return z @ a.T


def test_its_mean_is_the_squared_frobenius_norm_per_entry() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    z = torch.zeros(20_000, 6, dtype=torch.float64)  # every sample is a draw of its own
    expected = a.square().sum() / 6
    estimate = jacobian_loss(linear, z, a, generator=draw)
    assert estimate.item() == pytest.approx(expected.item(), rel=0.03)  # standard deviation of the mean: under 1 %


def test_its_gradient_is_that_of_the_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    z = torch.zeros(50_000, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(jacobian_loss(linear, z, a, generator=draw), a)
    torch.testing.assert_close(gradient, 2 * a.detach() / 6, rtol=0.0, atol=0.05)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestExact:
    """Maps whose vᵀJ is known for the very v that was drawn."""

    @pytest.mark.parametrize("probes", [1, 3])
    def test_linear(self, probes: int) -> None:
        a, z = normal(0, 5, 5), normal(1, 4, 5)
        draw = seeded(7)
        expected = torch.zeros(4, dtype=torch.float64)
        for _ in range(probes):
            v = torch.randn(4, 5, dtype=torch.float64, generator=draw)
            expected += (v @ a).square().mean(dim=1) / probes
        found = jacobian_loss(linear, z, a, probes=probes, per_sample=True, generator=seeded(7))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)
        found = jacobian_loss(linear, z, a, probes=probes, generator=seeded(7))
        torch.testing.assert_close(found, expected.mean(), rtol=1e-13, atol=0.0)

    def test_elementwise(self) -> None:
        """With J = diag(slopes), vᵀJ = v · slopes."""
        z = normal(0, 2, 3, 4)
        v = torch.randn(2, 12, dtype=torch.float64, generator=seeded(1)).view(2, 3, 4)
        found = jacobian_loss(torch.sin, z, generator=seeded(1))
        torch.testing.assert_close(found, (v * z.cos()).square().mean(), rtol=1e-13, atol=0.0)

    @pytest.mark.parametrize("f", [lambda z, a: a.expand(2, 3), lambda z, a: torch.ones(2, 3, dtype=z.dtype)])
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_of_a_map_that_ignores_z(self, f: Callable[..., Tensor], needs_grad: bool) -> None:
        a = torch.ones(3, dtype=torch.float64, requires_grad=needs_grad)
        assert jacobian_loss(f, normal(0, 2, 3), a).item() == 0.0


@pytest.mark.parametrize("name", ["tanh_contraction", "nested", "one_hard", "cosine"])
@pytest.mark.parametrize("probes", [1, 4])
def test_is_unbiased_for_every_sample(name: str, probes: int) -> None:
    """The mean of many estimates lies within four standard errors of ‖J‖²_F / D, whatever the structure of z."""
    problem = PROBLEMS[name](3, (2, 2), torch.float64)
    frobenius = jacobian(problem.f, problem.exact, *problem.args).square()
    expected = frobenius.sum((1, 2)) / frobenius.shape[1]
    draw = seeded(0)
    draws = torch.stack([
        jacobian_loss(problem.f, problem.exact, *problem.args, probes=probes, per_sample=True, generator=draw)
        for _ in range(800)
    ])  # fmt: skip
    error = draws.std(dim=0) / 800**0.5
    assert (draws.mean(dim=0) - expected).abs().max() > 0
    assert ((draws.mean(dim=0) - expected).abs() <= 4 * error).all()
    assert (error < 0.08 * expected).all()


def test_more_probes_have_less_variance() -> None:
    """2 ‖JJᵀ‖²_F / (D² probes), of every sample."""
    a = normal(0, 4, 4)
    z = torch.zeros(20_000, 4, dtype=torch.float64)
    for probes in (1, 5):
        variance = jacobian_loss(linear, z, a, probes=probes, per_sample=True, generator=seeded(0)).var()
        expected = 2 * (a @ a.T).square().sum() / 16 / probes
        assert variance.item() == pytest.approx(expected.item(), rel=0.1)


class TestGradient:
    """Against differences of the loss itself, with the same v: z held, or solved anew for the other weights."""

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor]:
        return 0.6 * orthogonal(4), normal(2, 3, 4)

    @staticmethod
    def solve(W: Tensor, x: Tensor) -> Tensor:
        return fixed_point(tanh_map, torch.zeros_like(x), W, x, solver=Picard(), stopping=TIGHT).z

    def check(self, loss: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        W = W.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(W), W)
        W = W.detach()
        for seed in range(3):
            direction = normal(seed, 4, 4)
            with torch.no_grad():
                difference = (loss(W + 1e-5 * direction) - loss(W - 1e-5 * direction)) / 2e-5
            assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
        return gradient

    def losses(self, probes: int) -> list[Tensor]:
        W, x = self.inputs()
        z = self.solve(W, x)

        def held(W: Tensor) -> Tensor:
            return jacobian_loss(tanh_map, z, W, x, probes=probes, generator=seeded(0))

        def solved(W: Tensor) -> Tensor:
            return jacobian_loss(tanh_map, self.solve(W, x), W, x, probes=probes, detach=False, generator=seeded(0))

        return [self.check(held, W), self.check(solved, W)]

    @pytest.mark.parametrize("probes", [1, 2])
    def test_with_the_point_held_and_through_it(self, probes: int) -> None:
        held, solved = self.losses(probes)
        assert (held - solved).abs().max() > 1e-3 * held.abs().max()  # the path through z counts

    def test_attached_points_are_detached_unless_asked(self) -> None:
        W, x = self.inputs()
        W.requires_grad_()
        z = self.solve(W, x)
        loss = jacobian_loss(tanh_map, z, W, x, generator=seeded(0))
        (gradient,) = torch.autograd.grad(loss, W)
        held = jacobian_loss(tanh_map, z.detach(), W, x, generator=seeded(0))
        assert torch.equal(gradient, torch.autograd.grad(held, W)[0])

    def test_through_a_nested_state(self) -> None:
        problem = PROBLEMS["nested"](2, (3,), torch.float64)
        W, x = problem.args
        W.requires_grad_()

        def loss(W: Tensor) -> Tensor:
            z = fixed_point(problem.f, problem.z0, W, x, solver=Picard(), stopping=TIGHT).z
            return jacobian_loss(problem.f, z, W, x, detach=False, generator=seeded(0))

        (gradient,) = torch.autograd.grad(loss(W), W)
        direction = normal(0, *W.shape)
        with torch.no_grad():
            difference = (loss(W + 1e-5 * direction) - loss(W - 1e-5 * direction)) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning",
                            "ignore:`torch._prims_common.check`:FutureWarning")  # fmt: skip
def test_of_a_compiled_map() -> None:
    """What torch.compile makes refuses a second derivative."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    compiled = torch.compile(layer, backend="aot_eager")
    z = normal(0, 2, 3)
    assert torch.allclose(compiled(z), layer(z))
    gradients = []
    for f in (layer, compiled):
        loss = jacobian_loss(f, z, generator=seeded(0))
        gradients.append(torch.autograd.grad(loss, layer.get_parameter("0.weight"))[0])
    assert torch.equal(*gradients)
    torch._dynamo.reset()


def test_under_no_grad_it_holds_no_graph() -> None:
    a = normal(0, 3, 3).requires_grad_()
    with torch.no_grad():
        loss = jacobian_loss(linear, normal(1, 2, 3), a, generator=seeded(0))
    assert not loss.requires_grad
    assert loss.item() == jacobian_loss(linear, normal(1, 2, 3), a, generator=seeded(0)).item()


def test_low_precision_is_averaged_in_float32() -> None:
    z = torch.randn(4, 3, generator=seeded(0)).bfloat16()
    loss = jacobian_loss(lambda z: 0.5 * z, z, probes=2, per_sample=True, generator=seeded(1))
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()


@pytest.mark.parametrize("probes", [0, 1.5, "all"])
def test_refuses_a_number_of_probes_that_is_none(probes: Any) -> None:
    with pytest.raises(ValueError, match="probes must be an integer >= 1"):
        jacobian_loss(torch.sin, torch.zeros(1, 1), probes=probes)


def test_refuses_a_map_with_dropout() -> None:
    with pytest.raises(RandomMapError, match="Dropout"):
        jacobian_loss(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.zeros(1, 2))


class TestSchedule:
    def test_constant_weight_at_every_step(self) -> None:
        assert {JacobianSchedule(weight=0.3, share=1.0)(step) for step in range(0, 10_000, 7)} == {0.3}

    def test_never(self) -> None:
        assert not any(map(JacobianSchedule(weight=0.3, share=0.0), range(1000)))

    def test_the_weight_grows_in_steps_from_the_start_on(self) -> None:
        schedule = JacobianSchedule(weight=1.9, share=1.0, increment=0.1, every=35, start=10, stop=100)
        for step in range(120):
            expected = 1.9 + 0.1 * ((step - 10) // 35) if 10 <= step < 100 else 0.0
            assert schedule(step) == expected
        assert (schedule(9), schedule(10), schedule(44), schedule(45), schedule(100)) == (0.0, 1.9, 1.9, 2.0, 0.0)

    @pytest.mark.parametrize("share", [0.1, 0.35, 0.9])
    def test_the_share_is_that_of_the_steps(self, share: float) -> None:
        applied = [JacobianSchedule(weight=1.0, share=share, seed=3)(step) > 0 for step in range(10_000)]
        deviation = (share * (1 - share) / len(applied)) ** 0.5
        assert sum(applied) / len(applied) == pytest.approx(share, abs=4 * deviation)
        repeats = [a and b for a, b in pairwise(applied)]  # independent: share² of the neighbours
        assert sum(repeats) / len(repeats) == pytest.approx(share**2, abs=4 * share * (1 - share**2) ** 0.5 / 100)

    def test_depends_on_seed_and_step_alone(self) -> None:
        """As a resumed run asks: from the middle, with the global random state elsewhere."""
        first = [JacobianSchedule(weight=1.0, seed=1)(step) for step in range(200)]
        torch.manual_seed(12)
        before = torch.get_rng_state()
        again = [JacobianSchedule(weight=1.0, seed=1)(step) for step in reversed(range(100, 200))]
        assert again[::-1] == first[100:]
        assert torch.equal(torch.get_rng_state(), before)
        other = [JacobianSchedule(weight=1.0, seed=2)(step) for step in range(200)]
        assert first != other
        assert first[1:] != other[:-1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": -1.0}, "weight must be a finite number >= 0"),
            ({"weight": float("nan")}, "weight must be a finite number >= 0"),
            ({"increment": float("inf")}, "increment must be a finite number >= 0"),
            ({"share": 1.1}, r"share must lie in \[0, 1\]"),
            ({"every": 0}, "every must be an integer >= 1"),
            ({"start": -1}, "start must be an integer >= 0"),
            ({"start": 5, "stop": 4}, "stop must be an integer >= 5"),
            ({"seed": 0.5}, "seed must be an integer >= 0"),
        ],
    )
    def test_refuses_what_makes_no_sense(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            JacobianSchedule(**{"weight": 1.0, **options})


def test_the_point_is_constant_and_the_module_learns() -> None:
    layer = nn.Linear(4, 4)
    z = torch.randn(3, 4, requires_grad=True)
    loss = jacobian_loss(lambda z: torch.tanh(layer(z)), z)
    loss.backward()
    assert z.grad is None
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_a_descent_step_shrinks_the_jacobian() -> None:
    torch.manual_seed(0)
    model = DEQTransformerLM(TransformerConfig(vocab_size=11, d_model=16, n_head=2, d_inner=32, mem_len=0))
    tokens = torch.randint(11, (8, 12))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    for _ in range(20):
        loss = model(tokens, tokens, jacobian=True).jacobian
        assert loss is not None
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])


def test_a_model_gives_it_only_where_asked_and_solved() -> None:
    model = DEQTransformerLM(TransformerConfig(vocab_size=11, d_model=16, n_head=2, d_inner=32, subseq_len=3))
    tokens = torch.randint(11, (2, 7))
    assert model(tokens, tokens).jacobian is None
    assert model(tokens, tokens, jacobian=True, depth=2).jacobian is None
    penalty = model(tokens, tokens, jacobian=True).jacobian
    assert penalty is not None
    assert penalty.dim() == 0
