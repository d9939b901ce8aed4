import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from segments import TIGHT, V, assert_same_gradients, gradients, text

from equilibria import Anderson, Implicit, Picard, Stopping, Unrolled
from equilibria.adjoints import Adjoint
from equilibria.models.block import Memory
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
from equilibria.solvers import Solver

D = 16


def make(*, solver: Solver[Any] | None = None, adjoint: Adjoint | None = None, **options: Any) -> DEQTransformerLM:
    """A small float64 model with weights large enough to matter, and small enough to converge."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": D, "n_head": 2, "d_inner": 12, "mem_len": 6}
    config = TransformerConfig(vocab_size=V, **(sizes | options))
    model = DEQTransformerLM(
        config, solver=solver or Anderson(), stopping=TIGHT, adjoint=adjoint or Implicit(stopping=TIGHT)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.inject.weight.mul_(6)
    return model


@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"weight_norm": True, "local_size": 4}])
def test_output_is_the_loss_of_an_equilibrium(options):
    model = make(**options)
    tokens, targets = text()
    nll, memory, stats, _ = model(tokens, targets)
    assert nll.shape == tokens.shape
    assert len(stats) == 1
    assert stats[0].converged.all()
    full = make(**options)
    full.mem_len = 9
    z = full(tokens, targets).memory.z
    u = model.inject(model.embedding.tables[0][tokens] * D**0.5)
    args = model.block.prepare(u, None, None, model.config.local_size)
    torch.testing.assert_close(model.block(z, *args), z, rtol=1e-10, atol=1e-10)
    log_p = (z @ model.embedding.tables[0].T + model.softmax.biases[0]).log_softmax(-1)
    torch.testing.assert_close(nll, -log_p.gather(-1, targets[..., None])[..., 0], rtol=1e-9, atol=1e-9)
    assert torch.equal(memory.z, z[:, 3:])
    torch.testing.assert_close(memory.u, u[:, 3:])
    assert not memory.z.requires_grad
    assert not memory.u.requires_grad


@pytest.mark.parametrize("local_size", [None, 4])
def test_two_segments_with_memory_are_one_long_segment(local_size):
    """Exact where the memory holds all that the window reaches: memory columns are equilibria already, and their keys
    and values, computed from these, are those the joint solve has at its end. mem_len 6 covers a first segment of 6."""
    model = make(local_size=local_size)
    tokens, targets = text(length=10)
    joint = model(tokens, targets).nll
    first = model(tokens[:, :6], targets[:, :6])
    second = model(tokens[:, 6:], targets[:, 6:], first.memory)
    torch.testing.assert_close(torch.cat((first.nll, second.nll), 1), joint, rtol=1e-9, atol=1e-9)
    assert (model(tokens[:, 6:], targets[:, 6:]).nll - joint[:, 6:]).abs().max() > 1e-3  # the memory matters


def test_memory_is_the_last_mem_len_positions_of_memory_and_segment():
    model = make()
    tokens, targets = text(length=9)
    long = copy.deepcopy(model)
    long.mem_len = 100
    whole = long(tokens[:, 4:], targets[:, 4:], long(tokens[:, :4], targets[:, :4]).memory).memory
    assert whole.z.shape == (3, 9, D)
    model.mem_len = 7
    kept = model(tokens[:, 4:], targets[:, 4:], model(tokens[:, :4], targets[:, :4]).memory).memory
    assert torch.equal(kept.z, whole.z[:, 2:])
    assert torch.equal(kept.u, whole.u[:, 2:])
    model.mem_len = 0
    assert model(tokens, targets).memory.z.shape == (3, 0, D)


def test_subsequences_see_the_piece_before_and_nothing_earlier():
    model, plain = make(subseq_len=4), make()
    tokens, targets = text(length=10)
    _, start = text(length=5)
    memory = plain(start, start).memory
    nll, _, stats, _ = model(tokens, targets, memory)
    assert len(stats) == 3  # 4, 4 and 2 positions
    plain.mem_len = 4
    expected, past = [], memory
    for span in (slice(0, 4), slice(4, 8), slice(8, 10)):
        out = plain(tokens[:, span], targets[:, span], past)
        expected.append(out.nll)
        past = Memory(out.memory.z[:, -4:], out.memory.u[:, -4:])
    torch.testing.assert_close(nll, torch.cat(expected, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"subseq_len": 4}, {"subseq_len": 4, "weight_norm": True, "dropout": 0.2}])
def test_implicit_gradients_are_those_of_the_unrolled_solve(options):
    tokens, targets = text()
    memory = make(mem_len=5)(tokens[:, :5], targets[:, :5]).memory
    found = []
    for solver, adjoint in ((Anderson(), Implicit(stopping=TIGHT)), (Picard(), Unrolled())):
        model = make(solver=solver, adjoint=adjoint, **options)
        torch.manual_seed(3)  # the same dropout masks
        found.append(gradients(model, tokens, targets, memory))
    assert_same_gradients(*found)


def test_gradients_flow_from_one_subsequence_into_the_one_before():
    model = make(subseq_len=4)
    tokens, targets = text(length=8)
    # The last token's loss: what it says about words that stand in the first piece alone.
    tokens = torch.where(torch.arange(8) < 4, tokens % 5, 5 + tokens % 6)
    (gradient,) = torch.autograd.grad(model(tokens, targets).nll[:, -1].sum(), [model.embedding.tables[0]])
    softmax_part = torch.autograd.grad(
        F.linear(torch.zeros(1, D).double(), model.embedding.tables[0], model.softmax.biases[0]).sum(),
        [model.embedding.tables[0]],
    )[0]
    assert softmax_part.abs().max() == 0
    model.mem_len = 4
    first = model(tokens[:, :4], targets[:, :4])
    cut = torch.autograd.grad(
        model(tokens[:, 4:], targets[:, 4:], first.memory).nll[:, -1].sum(), [model.embedding.tables[0]]
    )
    assert (gradient - cut[0])[:5].norm() > 1e-3 * gradient.norm()


def test_twin_has_the_parameters_of_the_equilibrium_and_tends_to_it():
    model, twin = make(), make(depth=600)
    assert twin.load_state_dict(model.state_dict()).missing_keys == []
    tokens, targets = text()
    memory = model(tokens, targets).memory
    equilibrium = model(tokens, targets, memory)
    stacked = twin(tokens, targets, memory)
    assert stacked.stats == []
    torch.testing.assert_close(stacked.nll, equilibrium.nll, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stacked.memory.z, equilibrium.memory.z, rtol=1e-9, atol=1e-9)
    shallow = model(tokens, targets, memory, depth=2)  # the same through the keyword
    assert torch.equal(shallow.nll, twin(tokens, targets, memory, depth=2).nll)
    assert (shallow.nll - equilibrium.nll).abs().max() > 1e-4
    assert_same_gradients(gradients(twin, tokens, targets, memory), gradients(model, tokens, targets, memory))


@pytest.mark.parametrize("options", [{}, {"weight_norm": True, "pre_norm": True}])
@pytest.mark.parametrize("depth", [None, 2])
def test_every_parameter_learns(options, depth):
    for gradient in gradients(make(dropout=0.1, **options), *text(), depth=depth):
        assert gradient.abs().max() > 0


def test_one_dropout_draw_per_forward_pass_shared_over_time(monkeypatch):
    model = make(dropout=0.5, subseq_len=3)
    seen = []
    prepare = model.block.prepare
    monkeypatch.setattr(model.block, "prepare", lambda u, past, masks, w: seen.append(masks) or prepare(u, past, masks, w))
    tokens, targets = text()
    first = model(tokens, targets).nll
    assert len(seen) == 3
    assert all(masks.hidden is seen[0].hidden and masks.output is seen[0].output for masks in seen)
    assert seen[0].attention.shape == (3, 1, D)
    assert not torch.equal(model(tokens, targets).nll, first)
    model.eval()
    assert torch.equal(model(tokens, targets).nll, model(tokens, targets).nll)


def test_float32_and_deepcopy():
    model = make(weight_norm=True).float()
    model.deq.stopping = Stopping(rtol=1e-4)
    tokens, targets = text()
    out = copy.deepcopy(model)(tokens, targets)
    assert out.nll.dtype == torch.float32
    torch.testing.assert_close(out.nll.double(), make(weight_norm=True)(tokens, targets).nll, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"vocab_size": 0}, {"mem_len": -1}, {"local_size": 0}, {"subseq_len": 0}, {"depth": 0}, {"n_head": 0}],
)
def test_impossible_config(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        TransformerConfig(**({"vocab_size": V} | options))


def test_inputs_that_do_not_fit_are_refused():
    model = make()
    tokens, targets = text()
    with pytest.raises(ValueError, match="tokens have shape"):
        model(tokens[0], targets[0])
    with pytest.raises(ValueError, match="tokens have shape"):
        model(tokens[:, :0], targets[:, :0])
    with pytest.raises(ValueError, match="targets have shape"):
        model(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match="None at the start of a text"):
        model(tokens[:2], targets[:2], model(tokens, targets).memory)


def test_memory_of_another_length_outside_training():
    model = make(mem_len=2, eval_mem_len=5)
    tokens, targets = text()
    assert model(tokens, targets).memory.z.shape == (3, 2, D)
    assert model.eval()(tokens, targets).memory.z.shape == (3, 5, D)
    assert model.window == 6


WORDS = {"cutoffs": (3, 7), "div_val": 2, "d_embed": 8}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("projections", [None, (True, False, True), (False, False, False)])
def test_what_embedding_and_softmax_share(tied, projections):
    model = make(**WORDS, tie_weights=tied, tie_projections=projections)
    flags = projections or (False, True, True)
    for i in range(3):
        assert (model.softmax.weights[i] is model.embedding.tables[i]) == tied
        assert (model.softmax.projections[i] is model.embedding.projections[i]) == flags[i]
    tokens, targets = text(length=12)
    model(tokens, targets).nll.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_flags_for_another_number_of_clusters():
    with pytest.raises(ValueError, match="2 entries; give one per cluster: 3"):
        make(**WORDS, tie_projections=(True, True))


def test_adaptive_words_and_log_prob():
    model = make(**WORDS).eval()
    tokens, targets = text()
    nll = model(tokens, targets).nll
    z = model.extend(tokens, None)[0]
    log_prob = model.log_prob(z)
    assert log_prob.shape == (3, 9, V)
    torch.testing.assert_close(log_prob.gather(-1, targets[..., None])[..., 0], -nll)


def test_dropped_attention_weights_are_those_of_one_solve():
    model = make(attention_dropout=0.5)
    tokens, targets = text()
    out = model(tokens, targets)
    assert out.stats[0].converged.all()  # the mask stayed the same while z moved
    assert not torch.equal(model(tokens, targets).nll, out.nll)
    torch.manual_seed(3)
    found = [gradients(model, tokens, targets)]
    model = make(attention_dropout=0.5, solver=Picard(), adjoint=Unrolled())
    torch.manual_seed(3)
    found.append(gradients(model, tokens, targets))
    assert_same_gradients(*found)
    torch.testing.assert_close(model.eval()(tokens, targets).nll, make()(tokens, targets).nll)


def test_attention_weights_are_dropped_one_by_one_and_keep_their_mean():
    block = make(attention_dropout=0.25).block
    mask = block.draw_weights_mask(torch.zeros(30, 8, 3 * D).double(), 20)
    assert mask.shape == (30, 2, 8, 20)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(mask.mean().item() - 1) < 0.02


@pytest.mark.parametrize(("positions", "shape"), [(False, (3, 1, D)), (True, (3, 9, 1))])
def test_dropout_of_the_output_drops_units_or_as_released_positions(positions, shape):
    model = make(dropout=0.5, drop_positions=positions)
    mask = model.output_dropout.mask(torch.zeros(3, 9, D))
    assert mask is not None
    assert mask.shape == shape


def test_initialisation_reaches_weights_under_weight_norm_or_as_released_does_not():
    def spread(**options: Any) -> float:
        torch.manual_seed(0)
        config = TransformerConfig(vocab_size=V, d_model=64, d_inner=64, init_std=0.01, **options)
        return DEQTransformerLM(config).block.ff_in.weight.std().item()

    assert abs(spread() - 0.01) < 1e-3
    assert abs(spread(weight_norm=True) - 0.01) < 1e-3
    assert abs(spread(init_normed=False) - 0.01) < 1e-3
    assert abs(spread(weight_norm=True, init_normed=False) - (1 / 64 / 3) ** 0.5) < 5e-3
