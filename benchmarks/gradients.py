"""Do implicit gradients agree with unrolled ones and with finite differences?

Float64, the block of the DEQ-Transformer: the loss <w, z*> differentiated in every parameter and the injection,
once implicitly, once through the recorded steps of Picard, and along random directions by central differences.

    python benchmarks/gradients.py
"""

from __future__ import annotations

import torch
from harness import save
from torch import Tensor

from equilibria import Anderson, Implicit, Picard, Stopping, Unrolled, fixed_point
from equilibria.adjoints import Adjoint
from equilibria.models.block import TransformerBlock
from equilibria.solvers import Solver

TIGHT = Stopping(rtol=1e-13, atol=0.0, max_evals=400)


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    block = TransformerBlock(16, 2, 32)
    injection = (4 * torch.randn(2, 6, 48)).requires_grad_()  # large enough that Picard converges too
    weight = torch.randn(2, 6, 16)
    inputs = [injection, *block.parameters()]

    def loss(solver: Solver, adjoint: Adjoint) -> Tensor:
        args = block.prepare(injection)
        z0 = block.initial(injection)
        z, stats = fixed_point(block, z0, *args, solver=solver, stopping=TIGHT, adjoint=adjoint)
        assert float(stats.relative.max()) < 1e-11
        return (z * weight).sum()

    implicit = torch.autograd.grad(loss(Anderson(), Implicit(stopping=TIGHT)), inputs)
    unrolled = torch.autograd.grad(loss(Picard(), Unrolled()), inputs)
    against_unrolled = max(float((a - b).norm() / b.norm()) for a, b in zip(implicit, unrolled, strict=True))

    worst, epsilon = 0.0, 1e-5
    for tensor, gradient in zip(inputs, implicit, strict=True):
        direction = torch.randn_like(tensor)
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                tensor.add_(sign * epsilon * direction)
                values.append(float(loss(Anderson(), Implicit())))
                tensor.sub_(sign * epsilon * direction)
        numeric = (values[0] - values[1]) / (2 * epsilon)
        analytic = float((gradient * direction).sum())
        worst = max(worst, abs(numeric - analytic) / float(gradient.norm() * direction.norm()))
    print(f"implicit against unrolled: {against_unrolled:.1e} relative; against central differences: {worst:.1e}")
    save("gradients", {"against_unrolled": against_unrolled, "against_differences": worst, "tensors": len(inputs)})
    if max(against_unrolled, worst) > 1e-6:
        raise SystemExit("the gradients disagree")


if __name__ == "__main__":
    main()
