"""Equilibrium layers among the rest of PyTorch: checkpointing, optimizers, modes, devices, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import affine_map, normal, orthogonal, tanh_map
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from equilibria import DEQ, Anderson, Implicit, Neumann, Phantom, Picard, Stopping, Unrolled, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=300)
IMPLICIT = Implicit(stopping=TIGHT)
ADJOINTS: dict[str, Any] = {
    "implicit": IMPLICIT,
    "phantom": Phantom(steps=2),
    "unrolled": Unrolled(),
    "neumann": Neumann(),
    "unrolled in segments": Unrolled(checkpoint=True),
}
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
W = 0.8 * orthogonal(4)
X = normal(0, 3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.inner.weight.copy_(W)
            self.inner.bias.copy_(normal(1, 4))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class Network(nn.Module):
    """Layers before and behind an equilibrium."""

    def __init__(self, adjoint: Any = IMPLICIT) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.behind = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
        self.layer = DEQ(Block(), stopping=TIGHT, adjoint=adjoint)

    def forward(self, x: Tensor, run: Callable[..., Any] = lambda f, x: f(x)) -> Tensor:
        return self.behind(run(lambda x: self.layer(torch.sin(self.before(x))).z, x))


def gradients(loss: Tensor, network: nn.Module, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters()), **options))


def close(one: list[Tensor], other: list[Tensor], rtol: float = 1e-8) -> bool:
    return all(torch.allclose(a, b, rtol=rtol, atol=1e-10) for a, b in zip(one, other, strict=True))


class TestHigherOrder:
    def test_hessian_vector_product_of_a_whole_network(self) -> None:
        network, step = Network(), 1e-5
        loss = lambda: network(X).square().sum()  # noqa: E731
        directions = [normal(i, *p.shape) for i, p in enumerate(network.parameters())]
        first = gradients(loss(), network, create_graph=True)
        products = gradients(sum(((g * d).sum() for g, d in zip(first, directions, strict=True)), X.new_zeros(())), network)
        sides = []
        for sign in (1, -2):  # there, and back across the start
            with torch.no_grad():
                for p, d in zip(network.parameters(), directions, strict=True):
                    p.add_(d, alpha=sign * step)
            sides.append(gradients(loss(), network))
        differences = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
        for product, difference in zip(products, differences, strict=True):
            assert (product - difference).norm() <= 1e-6 * difference.norm()

    @pytest.mark.parametrize("adjoint", [IMPLICIT, Unrolled()], ids=["implicit", "unrolled"])
    def test_gradient_penalty(self, adjoint: Any) -> None:
        """The gradient of ‖∂z*/∂x‖², a loss that itself holds a derivative through the solve."""

        def penalty(weight: Tensor) -> Tensor:
            x = X.clone().requires_grad_()
            z = fixed_point(tanh_map, 0 * X, weight, x, solver=Anderson(history=2), stopping=TIGHT, adjoint=adjoint).z
            (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
            return slope.square().sum()

        weight = W.clone().requires_grad_()
        (found,) = torch.autograd.grad(penalty(weight), weight)
        step = 1e-6 * torch.eye(16).double().reshape(16, 4, 4)
        expected = torch.stack([(penalty(W + s) - penalty(W - s)).detach() / 2e-6 for s in step.clone()]).reshape(4, 4)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        assert expected.norm() > 1


class TestModes:
    @each_adjoint
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, adjoint: Any, reentrant: bool) -> None:
        network, x = Network(adjoint), X.clone().requires_grad_()
        plain = gradients(network(x).sum(), network)
        again = network(x, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)).sum()
        again.backward()
        assert close(plain, [p.grad for p in network.parameters() if p.grad is not None], rtol=1e-12)

    @each_adjoint
    def test_saved_tensors_elsewhere(self, adjoint: Any) -> None:
        network = Network(adjoint)
        plain = gradients(network(X).sum(), network)
        with torch.autograd.graph.save_on_cpu():
            loss = network(X).sum()
        assert close(gradients(loss, network), plain, rtol=1e-12)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
    @each_adjoint
    def test_anomaly_detection_and_deterministic_algorithms(self, adjoint: Any) -> None:
        network = Network(adjoint)
        plain = gradients(network(X).sum(), network)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autograd.detect_anomaly():
                assert close(gradients(network(X).sum(), network), plain, rtol=1e-12)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_inference_mode(self) -> None:
        """Parameters made outside; what comes out is a start for training."""
        network = Network()
        with torch.inference_mode():
            z, stats = network.layer(X)
            assert z.is_inference()
            assert stats.converged.all()
            assert torch.equal(z, fixed_point(network.layer.block, 0 * X, X, stopping=TIGHT).z)
        warm, cold = network.layer(X, z0=z), network.layer(X)
        assert warm.stats.evaluations < cold.stats.evaluations
        block = network.layer.block
        assert close(gradients(warm.z.sum(), block), gradients(cold.z.sum(), block))

    def test_backward_for_some_inputs_alone(self) -> None:
        network = Network()
        expected = gradients(network(X).sum(), network)
        inner = network.get_submodule("layer.block.inner")
        network(X).sum().backward(inputs=[inner.get_parameter("weight")])
        assert [name for name, p in network.named_parameters() if p.grad is not None] == ["layer.block.inner.weight"]
        place = [name for name, _ in network.named_parameters()].index("layer.block.inner.weight")
        found = inner.get_parameter("weight").grad
        assert found is not None
        assert close([found], [expected[place]], rtol=1e-12)

    @each_adjoint
    def test_two_threads(self, adjoint: Any) -> None:
        """A function with gradients, and a module that is served without."""
        network = Network(adjoint)

        def gradient(x: Tensor) -> list[Tensor]:
            weight = W.clone().requires_grad_()
            return list(torch.autograd.grad(fixed_point(tanh_map, 0 * x, weight, x, adjoint=adjoint).z.sum(), weight))

        def served(x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [network(x)]

        inputs = [normal(seed, 3, 4) for seed in range(8)]
        for job in (gradient, served):
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(job, inputs))
            assert all(torch.equal(found[0], job(x)[0]) for x, found in zip(inputs, together, strict=True))

    def test_random_numbers_drawn_by_another_thread(self) -> None:
        """By a sampler that serves other requests, say, at the very first evaluation; f itself is deterministic."""
        calls = 0

        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 1:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(torch.rand, 1).result()
            return tanh_map(z, W, x)

        assert torch.equal(fixed_point(f, 0 * X, W, X).z, fixed_point(tanh_map, 0 * X, W, X).z)

    def test_a_weight_computed_from_others(self) -> None:
        """weight_norm computes the weight anew at each access, from the parameters that learn."""
        block = Block()
        parametrizations.weight_norm(block.inner)
        loss = lambda: fixed_point(block, 0 * X, X, stopping=TIGHT, adjoint=IMPLICIT).z.square().sum()  # noqa: E731
        found = gradients(loss(), block)
        for parameter, gradient in zip(block.parameters(), found, strict=True):
            direction, losses = normal(3, *parameter.shape), []
            with torch.no_grad():
                for move in (1e-4, -2e-4, 1e-4):
                    parameter.add_(direction, alpha=move)
                    losses.append(loss().item())
            assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-6)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_takes_the_path_of_the_closed_form(name: str) -> None:
    """z = A z + b against (I - A)⁻¹ b: the same parameters after ten steps, accumulated and clipped."""
    target = normal(9, 3, 4)

    def train(solve: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        parameters = [value.clone(memory_format=torch.contiguous_format).requires_grad_() for value in (0.5 * W, X)]
        optimizer = OPTIMIZERS[name](parameters)

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=name == "sgd")
            for part in (0, 1):  # gradients accumulate over both
                loss = (solve(*parameters) - target).square()[part::2].sum()
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, 2.0)
            return (solve(*parameters) - target).square().sum().detach()

        losses = [float(optimizer.step(closure)) for _ in range(10)]  # type: ignore[arg-type]
        assert losses[-1] < losses[0]
        return parameters

    exact = train(lambda A, b: torch.linalg.solve(torch.eye(4).double() - A, b.mT).mT)
    found = train(lambda A, b: fixed_point(affine_map, 0 * X, A, b, stopping=TIGHT, adjoint=IMPLICIT).z)
    assert close(found, exact, rtol=1e-7)


def test_float16_without_a_scaler() -> None:
    half = [value.half().requires_grad_() for value in (W, X)]
    full = [value.detach().double().requires_grad_() for value in half]
    found, exact = (
        torch.autograd.grad(fixed_point(tanh_map, 0 * v[1].detach(), *v, stopping=Stopping(rtol=2e-3)).z.sum(), v)
        for v in (half, full)
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.float16
        assert (mine.double() - theirs).norm() <= 0.03 * theirs.norm()


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
class TestDevices:
    """The same on each: values, statuses, gradients of every adjoint, also with shrinking batches."""

    @each_adjoint
    @pytest.mark.parametrize("batch_dims", [None, (None, 0)], ids=["whole", "smaller"])
    @pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["picard", "anderson"])
    def test_core(self, device: str, adjoint: Any, batch_dims: Any, solver: Any) -> None:
        if device not in DEVICES:
            pytest.skip("there is no such device here")
        found = []
        for where in (device, "cpu"):
            args = [value.to(where).requires_grad_() for value in (W, X * torch.tensor([[0.01], [1.0], [0.02]]).double())]
            options = {"solver": solver, "adjoint": adjoint, "batch_dims": batch_dims, "stopping": TIGHT}
            z, stats = fixed_point(tanh_map, torch.zeros_like(args[1]), *args, **options)
            assert z.device.type == stats.residual.device.type == stats.status.device.type == where
            assert stats.converged.all()
            found.append([value.cpu() for value in (z.detach(), *torch.autograd.grad(z.square().sum(), args))])
        assert close(*found, rtol=1e-7)
