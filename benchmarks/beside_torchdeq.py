"""TorchDEQ and equilibria on one problem: what agrees, and what does not. Needs `pip install --no-deps torchdeq`.

z = tanh(z W + x) with W 0.9 times orthogonal, 4 samples of 16 numbers, float64. Everything is compared to this library's
solve to 1e-12 or to central differences.

    python benchmarks/beside_torchdeq.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from harness import save
from torch import Tensor

from equilibria import Anderson, Implicit, Phantom, Picard, Stopping, fixed_point

TIGHT = Stopping(rtol=1e-12, atol=0.0, max_evals=500)
SIZE, BATCH = 16, 4


def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W + x)


def ours(W: Tensor, x: Tensor, adjoint: Any = None) -> Tensor:
    adjoint = adjoint or Implicit(stopping=TIGHT)
    return fixed_point(f, torch.zeros(len(x), SIZE), W, x, stopping=TIGHT, adjoint=adjoint).z


def theirs(W: Tensor, x: Tensor, **options: Any) -> Tensor:
    deq: Any = importlib.import_module("torchdeq").get_deq(
        f_solver="anderson", b_solver="anderson", f_max_iter=300, b_max_iter=300, f_tol=1e-12, b_tol=1e-12,
        f_stop_mode="rel", b_stop_mode="rel", **options,
    )  # fmt: skip
    return deq(lambda z: f(z, W, x), torch.zeros(len(x), SIZE))[0][-1]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).detach().norm() / exact.detach().norm())


def gradient(z: Callable[[Tensor, Tensor], Tensor], W: Tensor, x: Tensor) -> Tensor:
    W = W.detach().requires_grad_()
    return torch.autograd.grad(z(W, x).square().sum(), W)[0]


def second(z: Callable[[Tensor, Tensor], Tensor], W: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """The Hessian of the loss in W, times v, by two backward passes."""
    W = W.detach().requires_grad_()
    first = torch.autograd.grad(z(W, x).square().sum(), W, create_graph=True)[0]
    return torch.autograd.grad((first * v).sum(), W)[0]


def alone(solve: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How far a sample is from where it is when it is solved alone."""
    return error(solve(x)[:1], solve(x[:1]))


def row(what: str, torchdeq: str, equilibria: str) -> dict[str, str]:
    return {"what": what, "torchdeq": torchdeq, "equilibria": equilibria}


def derivatives(W: Tensor, x: Tensor) -> list[dict[str, str]]:
    exact, v, h = gradient(ours, W, x), torch.randn(SIZE, SIZE), 1e-5
    central = (gradient(ours, W + h * v, x) - gradient(ours, W - h * v, x)) / (2 * h)
    ift: Any = lambda W, x: theirs(W, x, ift=True)  # noqa: E731
    phantom = gradient(lambda W, x: ours(W, x, Phantom(steps=5)), W, x)
    return [
        row("fixed point, difference", f"{error(theirs(W, x), ours(W, x)):.0e}", "–"),
        row("implicit gradient, difference (`ift=True`)", f"{error(gradient(ift, W, x), exact):.0e}", "–"),
        row("phantom gradient of 5 steps, difference (`grad=5`)",
            f"{error(gradient(lambda W, x: theirs(W, x, grad=5), W, x), phantom):.0e}", "–"),
        row("second derivatives against central differences, relative error",
            f"{error(second(ift, W, x, v), central):.0e}", f"{error(second(ours, W, x, v), central):.0e}"),
    ]  # fmt: skip


def solves(W: Tensor, x: Tensor) -> list[dict[str, str]]:
    get_deq = importlib.import_module("torchdeq").get_deq
    damped = get_deq(f_solver="fixed_point_iter", f_max_iter=300, f_tol=1e-3, f_stop_mode="rel").eval()
    out, info = damped(lambda z: f(z, W, x), torch.zeros(BATCH, SIZE), solver_kwargs={"tau": 0.1})
    true = float(((f(out[-1], W, x) - out[-1]).norm(dim=1) / f(out[-1], W, x).norm(dim=1)).max())
    stopping = Stopping(rtol=1e-3, max_evals=300)
    z, stats = fixed_point(f, torch.zeros(BATCH, SIZE), W, x, solver=Picard(damping=0.1), stopping=stopping)
    really = float(((f(z, W, x) - z).norm(dim=1) / f(z, W, x).norm(dim=1)).max())
    uneven, steep = x * torch.tensor([5.0, 1.0, 0.1, 0.01])[:, None], 1.3 * W
    deq = get_deq(f_solver="anderson", f_max_iter=50, f_tol=1e-3, f_stop_mode="rel").eval()

    def their_z(x: Tensor) -> Tensor:
        return deq(lambda z: f(z, steep, x), torch.zeros(len(x), SIZE))[0][-1]

    def our_z(x: Tensor) -> Tensor:
        return fixed_point(f, torch.zeros(len(x), SIZE), steep, x, solver=Anderson()).z

    typo = get_deq(f_sovler="anderson")
    return [
        row("damping 0.1, tolerance 1e-3: residual reported / true",
            f"{float(info['rel_lowest'].max()):.1e} / {true:.1e}", f"{float(stats.relative.max()):.1e} / {really:.1e}"),
        row("a sample in a batch against the same sample alone, tolerance 1e-3",
            f"{alone(their_z, uneven):.0e}", f"{alone(our_z, uneven):.0e}"),
        row("a misspelt option, `f_sovler=\"anderson\"`",
            f"ignored: solves with `{typo.f_solver.__name__}`", "`TypeError`"),
    ]  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    W, x = 0.9 * torch.linalg.qr(torch.randn(SIZE, SIZE))[0], torch.randn(BATCH, SIZE)
    rows = derivatives(W, x)
    with torch.no_grad():
        rows += solves(W, x)
    for each in rows:
        print(each)
    save("torchdeq", {"version": importlib.import_module("importlib.metadata").version("torchdeq"), "rows": rows})


if __name__ == "__main__":
    main()
