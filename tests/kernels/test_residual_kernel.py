"""The kernel of the residual against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import count_calls

from equilibria.kernels.residual import residual, triton

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (1, 1030), (2, triton.CHUNK + 3)])
def test_residual(shape, dtype, device):
    torch.manual_seed(0)
    z, fz = torch.randn(2, *shape, dtype=F64).to(device, dtype).unbind(0)
    found = residual(fz, z)
    work = F64 if dtype == F64 else torch.float32
    assert [part.dtype for part in found] == [work] * 3
    change = fz.to(F64) - z.to(F64)
    tiny = 4 * torch.finfo(work).eps
    torch.testing.assert_close(found.g.to(F64), change, rtol=tiny, atol=tiny)
    torch.testing.assert_close(found.norm.to(F64), change.norm(dim=1), rtol=tiny * shape[1] ** 0.5, atol=0)
    torch.testing.assert_close(found.scale.to(F64), fz.to(F64).norm(dim=1), rtol=tiny * shape[1] ** 0.5, atol=0)


def test_strides_and_batch(device):
    fz, z = torch.randn(2, 40, 3, device=device).mT
    found = residual(fz, z)
    assert torch.equal(found.g, fz - z)
    for i in range(3):
        alone = residual(fz[i : i + 1].contiguous(), z[i : i + 1])
        assert torch.equal(alone.norm, found.norm[i : i + 1])
        assert torch.equal(alone.scale, found.scale[i : i + 1])


def test_what_is_not_finite_shows_in_its_own_sample(device):
    z = torch.randn(3, 20, device=device)
    fz = z.clone()
    fz[1, 3] = torch.inf
    fz[2, 4] = torch.nan
    _, norm, scale = residual(fz, z)
    assert norm[0] == 0
    assert norm[1].isinf()
    assert scale[1].isinf()
    assert norm[2].isnan()
    assert scale[2].isnan()


def test_what_is_recorded_is_left_to_the_reference(device, monkeypatch):
    called = count_calls(monkeypatch, triton, "residual")
    z = torch.randn(2, 5, device=device, requires_grad=True)
    found = residual(2 * z, z)
    assert found.g.requires_grad
    assert not found.norm.requires_grad
    assert not called
    residual(z.detach(), z.detach())
    assert called
