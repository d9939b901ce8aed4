"""The block of the DEQ-TrellisNet: a causal convolution with the gates of an LSTM, split for an equilibrium solve."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.parametrizations import weight_norm as normalised


class TrellisBlock(nn.Module):
    """f([h; c]; u) = [σ(o) tanh(c'); c'],  c'_t = σ(f_t) c_(t-1) + σ(i_t) tanh(g_t),  (i, o, g, f) = W * h + b + u.

    The state is (B, L, 2H), hidden part h before cell c, with H = d_hidden + d_output; the injection u is (B, L, 4H), one
    part per gate. W * h is the causal convolution over time, Σ_j W_j h_(t - (k - 1 - j) dilation): its last tap is the
    present. The cell moves by one step, whatever the dilation. The d_output last channels of h are the output.

    Before the first position stand the columns `past`. Where they are fewer than the (k - 1) dilation that the convolution
    reaches back, the first of them stands for all before it, so that a memory of one column is repeated.

    All that stays the same while z moves is computed once, by `prepare`; `forward` uses nothing else.

    Args:
        d_hidden, d_output: their sum is H.
        kernel_size: k, taps of the convolution; 1 leaves the cell as the only way from one position to the next.
        dilation: positions from one tap to the next.
        dropout: probability of dropping a unit of what the convolution reads, for `draw_masks`. The cell is not dropped.
        weight_norm: W = g V / ‖V‖ for each of the 4H outputs.
        init_std: W starts as N(0, init_std²), b as 0.

    Raises:
        ValueError: a size below 1, or a probability outside [0, 1).

    Sources: Bai, Kolter & Koltun, "Trellis Networks for Sequence Modeling", 2019, section 5; the same, "Deep Equilibrium
    Models", 2019, section 3.3 and appendix B. The LSTM's gates stand in the order i, o, g, f of the released code.

    >>> block = TrellisBlock(d_hidden=6, d_output=4)
    >>> u = torch.randn(2, 5, 40)
    >>> block(block.initial(u), *block.prepare(u)).shape
    torch.Size([2, 5, 20])
    """

    batch_dims = (0, 0, 0, None, 0)
    """Which dimension of each argument from `prepare` carries the batch."""

    def __init__(
        self,
        d_hidden: int,
        d_output: int,
        kernel_size: int = 2,
        dilation: int = 1,
        *,
        dropout: float = 0.0,
        weight_norm: bool = False,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = {"d_hidden": d_hidden, "d_output": d_output, "kernel_size": kernel_size, "dilation": dilation}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        self.d_state = d_hidden + d_output  # H
        self.d_output, self.kernel_size, self.dilation = d_output, kernel_size, dilation
        self.conv = nn.Conv1d(self.d_state, 4 * self.d_state, kernel_size, dilation=dilation)  # holds W (4H, H, k) and b
        self.dropout = FrozenDropout(dropout, shared_dims=(1,))  # (B, 1, H)
        nn.init.normal_(self.conv.weight, std=init_std)
        nn.init.zeros_(self.bias)
        if weight_norm:  # after the initialisation, which would otherwise write to a derived tensor and be lost
            normalised(self.conv)

    @property
    def bias(self) -> Tensor:
        """b, (4H,)."""
        assert self.conv.bias is not None
        return self.conv.bias

    @property
    def reach(self) -> int:
        """(k - 1) dilation, how many positions back the convolution sees."""
        return (self.kernel_size - 1) * self.dilation

    # Before a solve

    def draw_masks(self, like: Tensor) -> Tensor | None:
        """The mask (B, 1, H) of one forward pass, with the dtype and device of `like` (B, ...); None to drop nothing."""
        return self.dropout.mask(like.new_empty(()).expand(like.shape[0], 1, self.d_state))

    def initial(self, injection: Tensor, *_: Any) -> Tensor:
        """z_0 = 0, (B, L, 2H)."""
        batch, length, _channels = injection.shape
        return injection.new_zeros(batch, length, 2 * self.d_state)

    def prepare(
        self, injection: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of `forward`: all that stays the same while z moves.

        Args:
            injection: (B, L, 4H), u.
            past: (B, P, 2H), P >= 1, states of the positions before the first; None for one of zeros.
            mask: of `draw_masks`; None to drop nothing.
        """
        if past is None:
            past = injection.new_zeros(injection.shape[0], 1, 2 * self.d_state)
        hidden, cell = past.split(self.d_state, dim=2)
        missing = self.reach - hidden.shape[1]
        if missing > 0:
            hidden = torch.cat((hidden[:, :1].expand(-1, missing, -1), hidden), dim=1)
        before = self.dropout(hidden[:, hidden.shape[1] - self.reach :], mask)
        return injection + self.bias, before, cell[:, -1:], taps(self.conv.weight), mask

    # During a solve

    def forward(
        self, z: Tensor, injection: Tensor, before: Tensor, cell_before: Tensor, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        """f(z), (B, L, 2H); the arguments are those that `prepare` returns."""
        hidden, cell = z.split(self.d_state, dim=2)
        columns = torch.cat((before, self.dropout(hidden, mask)), dim=1)  # (B, reach + L, H)
        i, o, g, f = (convolve(columns, weight, self.dilation) + injection).chunk(4, dim=2)
        shifted = torch.cat((cell_before, cell[:, :-1]), dim=1)
        cell = f.sigmoid() * shifted + i.sigmoid() * g.tanh()
        return torch.cat((o.sigmoid() * cell.tanh(), cell), dim=2)


def taps(weight: Tensor) -> Tensor:
    """The weight (out, in, k) of a convolution over time as `convolve` takes it, in the form that is fastest there.

    Measured on a CPU, for states of width 128 to 1400 and 1024 positions: in float32 oneDNN's convolution of channels-last
    tensors takes 0.65 to 1 times as long as one matrix product with the taps side by side, and nn.Conv1d, which wants the
    channels before time, up to 1.7 times. In float64 the product is faster, and on GPUs it is exact to float32, where
    convolutions are not by default.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # (out, in, 1, k)
    return weight.permute(2, 1, 0).flatten(0, 1)  # (k in, out)


def convolve(columns: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(B, (k - 1) dilation + L, in) -> (B, L, out), with the weight that `taps` made."""
    if weight.dim() == 4:
        image = columns.transpose(1, 2).unsqueeze(2)  # (B, in, 1, time), channels-last as it stands
        return F.conv2d(image, weight, dilation=(1, dilation)).squeeze(2).transpose(1, 2)
    kernel_size = weight.shape[0] // columns.shape[2]
    length = columns.shape[1] - (kernel_size - 1) * dilation
    windows = [columns[:, j * dilation : j * dilation + length] for j in range(kernel_size)]
    return torch.cat(windows, dim=2) @ weight
