"""Adaptive softmax: recorded losses and gradients, the definition, torch's own, cost, ties, low precision, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from recorded import load, read, same, same_gradients, starting_with
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from equilibria.nn import AdaptiveEmbedding, AdaptiveSoftmax

F64 = torch.float64
NAMES = {r"out_layers\.(\d+)\.weight": r"weights.\1", r"out_layers\.(\d+)\.bias": r"biases.\1", "out_projs": "projections"}
SPLIT_NAMES = {"tail_vectors": "cluster_weight", "tail_bias": "cluster_bias", "^weight": "weights.0", "^bias": "biases.0"}


def softmax(*sizes: Any, **options: Any) -> AdaptiveSoftmax:
    """In float64, with weights large enough that nothing is near uniform; biases too."""
    head = AdaptiveSoftmax(*sizes, init_std=0.8, projection_init_std=0.8, **options).to(F64)
    with torch.no_grad():
        for bias in (*head.biases, head.cluster_bias):
            if bias is not None:
                bias.normal_()
    return head


def dense(head: AdaptiveSoftmax, hidden: Tensor) -> Tensor:
    """log p of every word, (V,), of one hidden vector, word by word as it is defined."""
    c = head.clusters
    weight = [w for table in head.weights for w in table]
    bias = torch.cat(list(head.biases))
    projected = [hidden @ p for p in head.projections] or [hidden] * len(c.sizes)
    first = c.edges[1]
    scores = [weight[w] @ projected[0] + bias[w] for w in range(first)]
    if head.cluster_weight is not None and head.cluster_bias is not None:
        scores += [row @ projected[0] + b for row, b in zip(head.cluster_weight, head.cluster_bias, strict=True)]
    log_head = torch.stack(scores).log_softmax(0)
    result = list(log_head[:first])
    for i in range(1, len(c.sizes)):
        words = range(c.edges[i], c.edges[i + 1])
        within = torch.stack([weight[w] @ projected[i] + bias[w] for w in words]).log_softmax(0)
        result += list(log_head[-i] + within)
    return torch.stack(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
class TestRecorded:
    def test_adaptive_softmax(self, shared_golden, dtype):
        config, groups = read(shared_golden / "component_adaptive_softmax", dtype)
        for name, options in config["variants"].items():
            recorded, params = groups[name], starting_with("param.", groups[name])
            head = AdaptiveSoftmax(
                options["n_token"], options["d_embed"], options["d_proj"], options["cutoffs"], options["div_val"]
            )
            load(head, NAMES, params)
            hidden, targets = recorded["hidden"].requires_grad_(), recorded["target"]
            nll = head(hidden, targets)
            same(nll, recorded["nll_in_order"])
            same(nll[head.cluster_order(targets)], recorded["nll_cluster_order"])
            same(-head.log_prob(hidden[:2]), recorded["all_nll"])
            nll.backward(recorded["upstream"])
            gradients = starting_with("grad.", recorded)
            same(hidden.grad, gradients.pop("hidden"))
            same_gradients(head, NAMES, gradients)

    def test_split_softmax(self, shared_golden, dtype):
        config, groups = read(shared_golden / "component_split_softmax", dtype)
        for name, options in config["variants"].items():
            recorded, width = groups[name], options["hidden_size"]
            head = AdaptiveSoftmax(options["n_token"], width, width, options["splits"])
            load(head, SPLIT_NAMES, starting_with("param.", recorded) | {k: recorded[k] for k in ("weight", "bias")})
            hidden = recorded["hidden"].requires_grad_()
            loss = head(hidden, recorded["target"]).mean()
            same(loss, recorded["loss"])
            if "all_logprob" in recorded:
                same(head.log_prob(hidden[: len(recorded["all_logprob"])]), recorded["all_logprob"])
            loss.backward()
            gradients = starting_with("grad.", recorded)
            same(hidden.grad, gradients.pop("hidden"))
            same_gradients(head, SPLIT_NAMES, gradients)


@st.composite
def heads(draw: st.DrawFn) -> AdaptiveSoftmax:
    n_token = draw(st.integers(2, 25))
    cutoffs = sorted(draw(st.sets(st.integers(1, n_token - 1), max_size=3)))
    div_val = draw(st.integers(1, 3))
    d_embed = draw(st.integers(div_val ** len(cutoffs), div_val ** len(cutoffs) + 4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return softmax(n_token, d_embed, draw(st.sampled_from([d_embed, 1, 5])), cutoffs, div_val)


class TestDefinition:
    @given(heads(), st.sampled_from([(), (0,), (1,), (7,), (3, 4), (2, 0)]))
    def test_in_the_order_of_the_targets(self, head: AdaptiveSoftmax, shape: tuple[int, ...]) -> None:
        c = head.clusters
        hidden, targets = torch.randn(*shape, c.d_model, dtype=F64), torch.randint(c.n_token, shape)
        nll = head(hidden, targets)
        assert nll.shape == shape
        for row, target, found in zip(hidden.reshape(-1, c.d_model), targets.flatten(), nll.flatten(), strict=True):
            torch.testing.assert_close(found, -dense(head, row)[target], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(
            -head.log_prob(hidden).gather(-1, targets[..., None])[..., 0], nll, rtol=1e-11, atol=1e-12
        )

    @given(heads())
    def test_probabilities_add_up_to_one(self, head: AdaptiveSoftmax) -> None:
        total = head.log_prob(torch.randn(4, head.clusters.d_model, dtype=F64)).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)

    def test_first_tail_has_the_last_row(self) -> None:
        head = softmax(9, 4, 4, (3, 6))
        assert head.cluster_bias is not None
        with torch.no_grad():
            head.cluster_bias.copy_(torch.tensor([0.0, 50.0]))
        p = head.log_prob(torch.zeros(1, 4, dtype=F64)).exp()[0]
        assert p[3:6].sum() > 1 - 1e-12

    @pytest.mark.parametrize("options", [(4, 3), (4, 3, (3, 7)), (3, 3, (3, 7)), (4, 3, (3, 7), 2)])
    def test_gradients(self, options: Any) -> None:
        head = softmax(12, *options)
        hidden = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
        targets = torch.tensor([[11, 0, 3], [7, 2, 5]])
        names = [name for name, _ in head.named_parameters()]

        def f(hidden: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (hidden, targets))

        assert torch.autograd.gradcheck(f, (hidden, *head.parameters()))

    def test_without_cutoffs_it_is_the_plain_softmax_to_the_bit(self) -> None:
        head, hidden, targets = softmax(12, 5, 5), torch.randn(7, 5, dtype=F64), torch.randint(12, (7,))
        plain = F.cross_entropy(F.linear(hidden, head.weights[0], head.biases[0]), targets, reduction="none")
        assert torch.equal(head(hidden, targets), plain)
        assert head.cluster_weight is None
        assert [name for name, _ in head.named_parameters()] == ["weights.0", "biases.0"]

    def test_cluster_order_is_stable(self) -> None:
        order = softmax(10, 4, 4, (3, 6)).cluster_order(torch.tensor([[9, 0, 4], [2, 7, 3]]))
        assert order.tolist() == [1, 3, 2, 5, 0, 4]

    @pytest.mark.parametrize("targets", [[0, 1, 2], [9, 9, 8], [4, 0, 5]])
    def test_clusters_that_do_not_occur_have_gradient_zero(self, targets: list[int]) -> None:
        head = softmax(10, 4, 4, (3, 6), 2)
        head(torch.randn(3, 4, dtype=F64), torch.tensor(targets)).sum().backward()
        present = {sum(t >= c for c in (3, 6)) for t in targets}
        for i in (1, 2):
            gradient = torch.as_tensor(head.weights[i].grad)
            assert bool(gradient.any()) == (i in present)


def test_agrees_with_torch():
    """`nn.AdaptiveLogSoftmaxWithLoss` has the same form, with its clusters' columns in the other order."""
    torch.manual_seed(0)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 40, [5, 12, 25], div_value=2.0, head_bias=True, dtype=F64)
    ours = AdaptiveSoftmax(40, 16, 16, (5, 12, 25), 2).to(F64)
    assert ours.cluster_weight is not None
    assert ours.cluster_bias is not None
    with torch.no_grad():
        ours.weights[0].copy_(theirs.head.weight[:5])
        ours.biases[0].copy_(theirs.head.bias[:5])
        ours.cluster_weight.copy_(theirs.head.weight[5:].flip(0))
        ours.cluster_bias.copy_(theirs.head.bias[5:].flip(0))
        ours.projections[0].copy_(torch.eye(16))
        for i, tail in enumerate(theirs.tail, start=1):
            ours.projections[i].copy_(tail[0].weight.T)  # pyright: ignore[reportIndexIssue]
            ours.weights[i].copy_(tail[1].weight)  # pyright: ignore[reportIndexIssue]
    hidden, targets = torch.randn(30, 16, dtype=F64), torch.randint(40, (30,))
    torch.testing.assert_close(ours(hidden, targets), -theirs(hidden, targets).output, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.log_prob(hidden), theirs.log_prob(hidden), rtol=1e-12, atol=1e-13)


def products(head: AdaptiveSoftmax, targets: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(len(targets), head.clusters.d_model, dtype=F64), targets)
    return counter.get_total_flops() // 2


class TestCost:
    def test_only_the_tokens_of_a_cluster_pay_for_it(self) -> None:
        n, head = 20, softmax(1000, 16, 8, (50, 300), 4)
        d, first, second = 8, 16 * (52 + 8), 4 * (250 + 8)
        assert d * 16 + 52 * 16 == first
        assert products(head, torch.zeros(n, dtype=torch.int64)) == n * first
        assert products(head, torch.tensor([0] * 17 + [60] * 3)) == n * first + 3 * second
        assert products(head, torch.tensor([0] * 10 + [999] * 10)) == n * first + 10 * (700 + d)

    def test_without_cutoffs_it_is_that_of_one_product(self) -> None:
        assert products(softmax(1000, 16, 16), torch.arange(20)) == 20 * 16 * 1000


class Model(nn.Module):
    def __init__(self, projections: Any, *sizes: Any) -> None:
        super().__init__()
        self.embedding, self.softmax = AdaptiveEmbedding(*sizes), AdaptiveSoftmax(*sizes)
        self.softmax.tie(self.embedding, projections)


class TestTies:
    @pytest.mark.parametrize("sizes", [(20, 8, 6, (5, 9), 2), (20, 8, 6, (5, 9), 1), (20, 8, 6), (20, 8, 8, (5, 9))])
    @pytest.mark.parametrize("first", [True, False])
    def test_survive_copies_moves_and_state_dicts(self, sizes: Any, first: bool) -> None:
        chosen = [first] + [True] * (len(sizes[3]) if len(sizes) > 3 else 0)
        model = Model(chosen, *sizes)
        other = Model(chosen, *sizes)
        other.load_state_dict(model.state_dict())
        for one in (model, copy.deepcopy(model), other.to(F64)):
            for table, weight in zip(one.embedding.tables, one.softmax.weights, strict=True):
                assert table is weight
            inputs = list(one.embedding.projections)
            for i, projection in enumerate(one.softmax.projections):
                assert (projection is inputs[min(i, len(inputs) - 1)]) == chosen[i]
        hidden, targets = torch.randn(3, sizes[2]), torch.tensor([0, 6, 19])
        torch.testing.assert_close(other.float().softmax(hidden, targets), model.softmax(hidden, targets), rtol=0, atol=0)

    def test_can_be_tied_again_after_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = Model(True, 20, 8, 6, (5, 9), 2)
        model.to_empty(device="cpu")
        model.softmax.tie(model.embedding, True)
        source = Model(True, 20, 8, 6, (5, 9), 2)
        model.load_state_dict(source.state_dict())
        hidden, targets = torch.randn(3, 6), torch.tensor([0, 6, 19])
        assert torch.equal(model.softmax(hidden, targets), source.softmax(hidden, targets))
        assert len(list(model.parameters())) == len(list(source.parameters()))

    def test_gradients_of_both_uses_add_up(self) -> None:
        model = Model(True, 20, 8, 6, (5, 9), 2)
        ids, hidden = torch.tensor([3, 6, 19]), torch.randn(3, 6)
        both = [*model.embedding.tables, *model.embedding.projections]

        def gradients(loss: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, both)

        of_input, of_output = model.embedding(ids).square().sum(), model.softmax(hidden, ids).sum()
        expected = [a + b for a, b in zip(gradients(of_input), gradients(of_output), strict=True)]
        (model.embedding(ids).square().sum() + model.softmax(hidden, ids).sum()).backward()
        for parameter, gradient in zip(both, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_with_an_ordinary_embedding(self) -> None:
        head, embedding = AdaptiveSoftmax(20, 8, 8, (5,)), nn.Embedding(20, 8)
        head.tie(embedding, projections=True)
        assert head.weights[0] is embedding.weight

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="give both the same sizes"):
            AdaptiveSoftmax(20, 8, 8).tie(AdaptiveEmbedding(20, 8, 8, (5,), 2))
        with pytest.raises(ValueError, match="give one per cluster: 2"):
            AdaptiveSoftmax(20, 8, 6, (5,)).tie(AdaptiveEmbedding(20, 8, 6, (5,)), [True])
        with pytest.raises(ValueError, match="or do not tie their projections"):
            AdaptiveSoftmax(20, 8, 6).tie(nn.Embedding(20, 8), True)
        with pytest.raises(ValueError, match="or do not tie their projections"):
            AdaptiveSoftmax(20, 8, 6).tie(AdaptiveEmbedding(20, 8, 7), True)


class TestMachinery:
    def test_number_of_parameters_without_memory(self) -> None:
        with torch.device("meta"):
            head = AdaptiveSoftmax(267735, 512, 512, (20000, 40000, 200000), 4)
        assert all(parameter.is_meta for parameter in head.parameters())
        sizes, widths = [20000, 20000, 160000, 67735], [512, 128, 32, 8]
        by_hand = sum((size + 512) * width + size for size, width in zip(sizes, widths, strict=True)) + 3 * 513
        assert sum(parameter.numel() for parameter in head.parameters()) == by_hand

    @pytest.mark.parametrize("cutoffs", [(), (50, 200)])
    def test_low_precision(self, cutoffs: tuple[int, ...]) -> None:
        """Logits lose what bfloat16 loses; the softmax adds nothing to that."""
        torch.manual_seed(0)
        head = AdaptiveSoftmax(500, 16, 16, cutoffs, init_std=0.3)
        hidden, targets = torch.randn(64, 16, requires_grad=True), torch.randint(500, (64,))
        exact = head(hidden, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = head(hidden, targets)
            total = head.log_prob(hidden).exp().sum(-1)
        assert low.dtype == torch.float32
        assert (low - exact).abs().max() < 0.1
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)
        low.mean().backward()
        assert head.to(torch.bfloat16)(hidden.bfloat16(), targets).dtype == torch.float32

    def test_is_drawn_with_the_standard_deviations_given(self) -> None:
        torch.manual_seed(0)
        head = AdaptiveSoftmax(4000, 64, 100, (500, 1000, 1500), 2, init_std=0.3, projection_init_std=0.02)
        for std, parameters in ((0.3, [*head.weights, head.cluster_weight]), (0.02, [*head.projections])):
            values = torch.cat([p.detach().flatten() for p in parameters if p is not None])
            assert values.std().item() == pytest.approx(std, rel=5 / (2 * len(values)) ** 0.5)
        assert not any(bias.any() for bias in (*head.biases, head.cluster_bias) if bias is not None)


class TestRefusals:
    def test_impossible_clusters(self) -> None:
        with pytest.raises(ValueError, match="give integers that increase and lie between 0 and n_token = 20"):
            AdaptiveSoftmax(20, 8, 8, (5, 20))
        with pytest.raises(ValueError, match="leaves width 0 to a cluster"):
            AdaptiveSoftmax(20, 8, 8, (5, 10), 4)

    @pytest.mark.parametrize("cutoffs", [(), (5, 9)])
    @pytest.mark.parametrize("word", [-100, -1, 20])
    def test_targets_outside_of_the_vocabulary(self, cutoffs: tuple[int, ...], word: int) -> None:
        with pytest.raises(ValueError, match="but the vocabulary has 20 words, 0 to 19"):
            AdaptiveSoftmax(20, 8, 8, cutoffs)(torch.randn(2, 8), torch.tensor([word, 3]))

    @pytest.mark.parametrize("cutoffs", [(), (5, 9)])
    def test_shapes_that_do_not_fit(self, cutoffs: tuple[int, ...]) -> None:
        head = AdaptiveSoftmax(20, 8, 8, cutoffs)
        with pytest.raises(ValueError, match="must be d_model = 8"):
            head(torch.randn(2, 7), torch.tensor([1, 3]))
        with pytest.raises(ValueError, match="must be d_model = 8"):
            head.log_prob(torch.randn(2, 7))
        with pytest.raises(ValueError, match="give one target for each position"):
            head(torch.randn(2, 8), torch.tensor([[1, 3]]))


@pytest.mark.parametrize("cutoffs", [(), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_are_integers_of_any_size(cutoffs, dtype):
    head, hidden, targets = softmax(11, 4, 5, cutoffs), torch.randn(2, 6, 5, dtype=F64), torch.randint(11, (2, 6))
    assert torch.equal(head(hidden, targets.to(dtype)), head(hidden, targets))
    with pytest.raises(ValueError, match="vocabulary has 11 words"):
        head(hidden, torch.full((2, 6), 11, dtype=dtype))


@pytest.mark.parametrize("cutoffs", [(), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.complex64])
def test_targets_are_integers(cutoffs, dtype):
    with pytest.raises(ValueError, match=rf"targets have dtype {dtype}; give the ids of words, as integers"):
        softmax(11, 4, 5, cutoffs)(torch.randn(2, 6, 5, dtype=F64), torch.ones(2, 6, dtype=dtype))


def test_small_integers_and_a_large_vocabulary():
    """The vocabulary's size is beyond the dtype of the targets."""
    head, hidden, targets = softmax(300, 4, 4, (100, 290)), torch.randn(5, 4, dtype=F64), torch.tensor([0, 99, 100, 127, 3])
    assert torch.equal(head(hidden, targets.to(torch.int8)), head(hidden, targets))
    assert torch.equal(head.cluster_order(targets.to(torch.int8)), head.cluster_order(targets))
