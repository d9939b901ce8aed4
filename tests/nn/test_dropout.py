import pytest
import torch

from equilibria.nn.dropout import FrozenDropout


def test_nothing_is_dropped_in_evaluation_or_with_p_zero():
    x = torch.randn(2, 3, 4)
    assert FrozenDropout(0.5).eval().mask(x) is None
    assert FrozenDropout(0.0).mask(x) is None
    assert FrozenDropout(0.5)(x, None) is x


@pytest.mark.parametrize(
    ("shared_dims", "shape"), [((), (2, 3, 4)), ((1,), (2, 1, 4)), ((0, 2), (1, 3, 1)), ((-1,), (2, 3, 1))]
)
def test_one_draw_is_shared_along_shared_dims(shared_dims, shape):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    drop = FrozenDropout(0.5, shared_dims)
    mask = drop.mask(x)
    assert mask is not None
    assert mask.shape == shape
    assert mask.dtype == x.dtype
    assert torch.equal(drop(x, mask), x * mask.expand_as(x))


def test_mask_is_bernoulli_over_its_keep_probability():
    torch.manual_seed(0)
    p, n = 0.3, 100_000
    mask = FrozenDropout(p).mask(torch.empty(n))
    assert mask is not None
    kept = mask != 0
    assert torch.allclose(mask[kept], torch.tensor(1 / (1 - p)))
    error = 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    assert abs(kept.float().mean().item() - (1 - p)) < error


def test_the_mask_is_drawn_from_the_global_generator():
    drop, x = FrozenDropout(0.5), torch.empty(64)
    torch.manual_seed(1)
    first, second = drop.mask(x), drop.mask(x)
    torch.manual_seed(1)
    again = drop.mask(x)
    assert first is not None
    assert second is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_probability(p):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        FrozenDropout(p)


def test_impossible_shared_dimension():
    with pytest.raises(ValueError, match="shared_dims holds 3"):
        FrozenDropout(0.5, (3,)).mask(torch.empty(2, 2))
