"""Dropout: what a mask is shared over, which values it has, what it does, for units, words and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equilibria.interop.verify.cases import Case, Recorded
from equilibria.interop.verify.draws import masks
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.nn.dropout import FrozenDropout, WordDropout
from equilibria.nn.parametrizations import DropConnect, weight_drop


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    p = case.config["p"]
    for name in sorted({key.split("/")[0] for key in recorded if key.endswith("/mask")}):
        tensors = recorded.under(f"{name}/")
        x, mask = tensors["x"], tensors["mask"]
        shared = [dim for dim, size in enumerate(mask.shape) if size != x.shape[dim]]
        drop = FrozenDropout(p, shared)
        ours = torch.stack([torch.as_tensor(drop.mask(x)) for _ in range(50)])
        report.relative("values of a mask", ours.unique(), mask.new_tensor([0.0, 1.0 / (1.0 - p)]), limit, name)
        _values("recorded mask", mask, p, limit, report, name)
        report.exact("shape of a mask", ours.shape[1:] == mask.shape, f"{name}: ours is {tuple(ours.shape[1:])}")
        report.relative("out", drop(x, mask), tensors["out"], limit, name)
        report.exact("nothing in evaluation", drop.eval().mask(x) is None, name)
    _check_words(recorded, p, limit, report)
    _check_weights(recorded, p, limit, report)


def _values(quantity: str, mask: Tensor, p: float, limit: float, report: Report, name: str) -> None:
    """A mask is 0 or 1 / (1 - p) everywhere."""
    kept = mask[mask != 0]
    report.relative(quantity, kept, torch.full_like(kept, 1.0 / (1.0 - p)), limit, name)


def _check_words(recorded: Recorded, p: float, limit: float, report: Report) -> None:
    tensors = recorded.under("embedded/")
    weight, ids = tensors["weight"].clone().requires_grad_(), tensors["ids"]
    mask = torch.ones_like(tensors["weight"][:, :1])
    mask[ids] = (tensors["out"] / tensors["weight"][ids])[..., :1]  # known of the words that occur
    for freeze, key in ((True, "grad_original"), (False, "grad_without_padding_quirk")):
        drop = WordDropout(p, freeze_last_row=freeze)
        with masks({drop.drop: mask}):
            out = drop(weight, ids)
        report.relative("embedded: out", out, tensors["out"], limit)
        (gradient,) = torch.autograd.grad(out, weight, tensors["upstream"])
        report.relative(f"embedded: {key}", gradient, tensors[key], limit)


def _check_weights(recorded: Recorded, p: float, limit: float, report: Report) -> None:
    tensors = recorded.under("weightdrop/")
    raw, x = tensors["raw"], tensors["x"]
    units, channels, *taps = raw.shape
    layer = nn.Conv1d(channels, units, *taps, bias=False) if taps else nn.Linear(channels, units, bias=False)
    layer.to(raw.dtype).load_state_dict({"weight": raw})
    weight_drop(layer, p=p, keep_last_tap=True)
    always = (torch.stack([layer.weight for _ in range(500)]) != 0).all(dim=0)
    expected = torch.zeros_like(always)
    expected[..., -1] = sum(taps) > 1  # of a convolution with several taps, the last is never dropped
    report.exact("weightdrop: last tap kept", torch.equal(always, expected))
    (drop,) = (module.drop for module in layer.modules() if isinstance(module, DropConnect))
    with masks({drop: tensors["effective"] / raw}):
        report.relative("weightdrop: effective", layer.weight, tensors["effective"], limit)
        dropped = layer(x)
    # The bias is not recorded, and not dropped: it cancels.
    report.relative("weightdrop: out", dropped - layer.eval()(x), tensors["out"] - tensors["out_eval"], limit)
