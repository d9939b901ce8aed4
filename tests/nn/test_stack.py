import pytest
import torch
from torch import Tensor, nn

from equilibria.nn.deq import DEQ
from equilibria.nn.stack import stack
from equilibria.stopping import Stopping


class Cell(nn.Module):
    """z -> tanh(A z + B x), with B x prepared and its preparations counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Parameter(0.3 * torch.eye(4, dtype=torch.float64) + 0.05 * torch.randn(4, 4).double())
        self.outer = nn.Parameter(torch.randn(4, 3).double())
        self.prepared = 0

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        self.prepared += 1
        return (x @ self.outer.T,)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 4)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.inner.T + u)


def test_stack_is_the_block_again_and_again_with_one_preparation():
    cell, x = Cell(), torch.randn(2, 3, dtype=torch.float64)
    z = torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(3):
        z = torch.tanh(z @ cell.inner.T + x @ cell.outer.T)
    assert torch.equal(stack(cell, 3, x), z)
    assert cell.prepared == 1


def test_deep_stack_tends_to_the_equilibrium():
    cell, x = Cell(), torch.randn(2, 3, dtype=torch.float64)
    z, _ = DEQ(cell, stopping=Stopping(rtol=1e-13, atol=0.0, max_evals=100))(x)
    error = [(stack(cell, depth, x) - z).norm().item() for depth in (1, 5, 80)]
    assert error[0] > 10 * error[1]
    assert error[2] < 1e-12


def test_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1 layer"):
        stack(Cell(), 0, torch.randn(2, 3, dtype=torch.float64))
