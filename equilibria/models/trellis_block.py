"""The block of the DEQ-TrellisNet: a causal convolution with the gates of an LSTM, split for an equilibrium solve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equilibria.models.causal_convolution import CausalConvolution, convolve
from equilibria.nn.dropout import FrozenDropout


class TrellisMasks(NamedTuple):
    """One draw for a whole forward pass; None where nothing is dropped."""

    hidden: Tensor | None = None
    """(B, 1, H) on what the convolution reads"""
    weight: Tensor | None = None
    """(4H, H, k) on its weight. Under weight norm it is dropped where it is normalised, not here."""


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
        dropout: probability of dropping a unit of what the convolution reads, at all positions. The cell is not dropped.
        weight_dropout: probability of dropping a weight of the convolution, except of its last tap.
        weight_norm: W = g V / ‖V‖ for each of the 4H outputs.
        init_std, bias_std: W starts as N(0, init_std²), b as N(0, bias_std²).

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
        weight_dropout: float = 0.0,
        weight_norm: bool = False,
        init_std: float = 0.01,
        bias_std: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"d_hidden": d_hidden, "d_output": d_output, "kernel_size": kernel_size, "dilation": dilation}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        self.d_state = d_hidden + d_output  # H
        self.d_output = d_output
        self.conv = CausalConvolution(
            self.d_state,
            4 * self.d_state,
            kernel_size,
            dilation,
            weight_dropout=weight_dropout,
            weight_norm=weight_norm,
            init_std=init_std,
            bias_std=bias_std,
        )
        self.dropout = FrozenDropout(dropout, shared_dims=(1,))  # (B, 1, H)

    # Before a solve

    def draw_masks(self, like: Tensor) -> TrellisMasks:
        """The masks of one forward pass, with the dtype and device of `like` (B, ...)."""
        hidden = like.new_empty(()).expand(like.shape[0], 1, self.d_state)
        return TrellisMasks(self.dropout.mask(hidden), self.conv.draw_mask())

    def initial(self, injection: Tensor, *_: Any) -> Tensor:
        """z_0 = 0, (B, L, 2H)."""
        batch, length, _channels = injection.shape
        return injection.new_zeros(batch, length, 2 * self.d_state)

    def prepare(
        self, injection: Tensor, past: Tensor | None = None, masks: TrellisMasks | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of `forward`: all that stays the same while z moves.

        Args:
            injection: (B, L, 4H), u.
            past: (B, P, 2H), P >= 1, states of the positions before the first; None for one of zeros.
            masks: of `draw_masks`; None to drop nothing.
        """
        masks = masks or TrellisMasks()
        if past is None:
            past = injection.new_zeros(injection.shape[0], 1, 2 * self.d_state)
        hidden, cell = past.split(self.d_state, dim=2)
        missing = self.conv.reach - hidden.shape[1]
        if missing > 0:
            hidden = torch.cat((hidden[:, :1].expand(-1, missing, -1), hidden), dim=1)
        before = self.dropout(hidden[:, hidden.shape[1] - self.conv.reach :], masks.hidden)
        return injection + self.conv.bias, before, cell[:, -1:], self.conv.taps(masks.weight), masks.hidden

    # During a solve

    def forward(
        self, z: Tensor, injection: Tensor, before: Tensor, cell_before: Tensor, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        """f(z), (B, L, 2H); the arguments are those that `prepare` returns."""
        hidden, cell = z.split(self.d_state, dim=2)
        columns = torch.cat((before, self.dropout(hidden, mask)), dim=1)  # (B, reach + L, H)
        i, o, g, f = (convolve(columns, weight, self.conv.dilation[0]) + injection).chunk(4, dim=2)
        shifted = torch.cat((cell_before, cell[:, :-1]), dim=1)
        cell = f.sigmoid() * shifted + i.sigmoid() * g.tanh()
        return torch.cat((o.sigmoid() * cell.tanh(), cell), dim=2)
