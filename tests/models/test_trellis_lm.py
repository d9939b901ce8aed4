import copy
import pickle
from typing import Any

import pytest
import torch
from segments import TIGHT, V, assert_same_gradients, gradients, text
from torch import Tensor

from equilibria import Anderson, Implicit, Picard, Stopping, Unrolled
from equilibria.adjoints import Adjoint
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig
from equilibria.models.generation import generate, next_token_log_prob
from equilibria.nn.dropout import FrozenDropout
from equilibria.solvers import Solver

D, HIDDEN = 4, 6
STATE = 2 * (HIDDEN + D)
DROPS = ("word_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")
DROPOUTS: dict[str, Any] = dict.fromkeys(DROPS, 0.2)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 3, "dilation": 2, "subseq_len": 4},
    {"weight_norm": True, "subseq_len": 4} | DROPOUTS,
    DROPOUTS,
    {"n_experts": 3, "d_output": 5, "latent_dropout": 0.3},
    {"cutoffs": (3, 6), "tie_weights": False, "d_output": 5},
]


def make(*, solver: Solver[Any] | None = None, adjoint: Adjoint | None = None, **options: Any) -> DEQTrellisNetLM:
    """A small float64 model with weights large enough to matter, and small enough to converge."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_embed": D, "d_hidden": HIDDEN, "d_output": D, "inject_std": 0.5, "embed_range": 1.0}
    config = TrellisConfig(vocab_size=V, **(sizes | options))
    model = DEQTrellisNetLM(
        config, solver=solver or Anderson(), stopping=TIGHT, adjoint=adjoint or Implicit(stopping=TIGHT)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_output_is_the_loss_of_an_equilibrium():
    model = make()
    tokens, targets = text()
    first = model(tokens, targets)
    nll, memory, stats, jacobian = model(tokens, targets, first.memory, jacobian=True)
    assert nll.shape == tokens.shape
    assert stats[0].converged.all()
    assert jacobian is not None
    words = torch.cat((torch.zeros(3, 1, D), model.embedding.weight[tokens]), 1)  # zeros before the segment
    weight = model.inject.weight
    u = words[:, :-1] @ weight[..., 0].T + words[:, 1:] @ weight[..., 1].T + model.inject.bias
    z = model.deq(u, first.memory.z).z
    torch.testing.assert_close(model.block(z, *model.block.prepare(u, first.memory.z)), z, rtol=1e-10, atol=1e-10)
    hidden = z[..., HIDDEN : HIDDEN + D]
    log_p = (hidden @ model.embedding.weight.T + dict(model.named_parameters())["softmax.biases.0"]).log_softmax(-1)
    torch.testing.assert_close(nll, -log_p.gather(-1, targets[..., None])[..., 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(memory.z, z[:, -1:], rtol=1e-9, atol=1e-9)
    assert not memory.z.requires_grad
    assert memory.z.untyped_storage().nbytes() == memory.z.nbytes  # the segment is not kept with it


def test_two_segments_with_memory_are_one_long_segment_where_one_column_is_all_that_is_seen():
    """The state of one position is all that the next one needs if the convolutions have a single tap."""
    model = make(kernel_size=1)
    tokens, targets = text(length=10)
    joint = model(tokens, targets).nll
    first = model(tokens[:, :6], targets[:, :6])
    second = model(tokens[:, 6:], targets[:, 6:], first.memory)
    torch.testing.assert_close(torch.cat((first.nll, second.nll), 1), joint, rtol=1e-9, atol=1e-9)
    assert (model(tokens[:, 6:], targets[:, 6:]).nll - joint[:, 6:]).abs().max() > 1e-3  # the memory matters


def test_pieces_see_the_last_column_of_the_piece_before_and_the_words_of_the_segment():
    model = make(subseq_len=4, kernel_size=3, dilation=2)
    tokens, targets = text(length=10)
    memory = model(tokens, targets).memory
    nll, last, stats, _ = model(tokens, targets, memory)
    assert len(stats) == 3  # 4, 4 and 2 positions
    past, pieces = memory.z, []
    for u in model.injection(tokens).split(4, dim=1):
        pieces.append(model.deq(u, past).z)
        past = pieces[-1][:, -1:]
    expected = model.softmax(model.output(torch.cat(pieces, 1)), targets)
    torch.testing.assert_close(nll, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last.z, past, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_implicit_gradients_are_those_of_the_unrolled_solve(options):
    tokens, targets = text()
    memory = make(**(options | {"subseq_len": None})).eval()(tokens, targets).memory
    found = []
    for solver, adjoint in ((Anderson(), Implicit(stopping=TIGHT)), (Picard(), Unrolled())):
        model = make(solver=solver, adjoint=adjoint, **options)
        torch.manual_seed(3)  # the same dropout masks
        found.append(gradients(model, tokens, targets, memory))
    assert_same_gradients(*found)


def test_gradients_flow_from_one_subsequence_into_the_one_before():
    model = make(subseq_len=4, tie_weights=False)
    tokens, targets = text(length=8)
    tokens = torch.where(
        torch.arange(8) < 3, tokens % 5, 5 + tokens % 6
    )  # the first three words are of the first piece alone
    (gradient,) = torch.autograd.grad(model(tokens, targets).nll[:, -1].sum(), [model.embedding.weight])
    assert gradient[:5].norm() > 1e-5 * gradient.norm()
    first = model(tokens[:, :4], targets[:, :4])
    (cut,) = torch.autograd.grad(model(tokens[:, 4:], targets[:, 4:], first.memory).nll.sum(), [model.embedding.weight])
    assert cut[:5].norm() == 0


def test_twin_has_the_parameters_of_the_equilibrium_and_tends_to_it():
    model, twin = make(weight_norm=True), make(weight_norm=True, depth=200)
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


def test_options_that_drop_leave_parameters_and_their_names_as_they_are():
    for weight_norm in (False, True):
        dropped, plain = make(weight_norm=weight_norm, **DROPOUTS), make(weight_norm=weight_norm)
        plain.load_state_dict(dropped.state_dict())
        tokens, targets = text()
        assert torch.equal(dropped.eval()(tokens, targets).nll, plain.eval()(tokens, targets).nll)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("depth", [None, 2])
def test_every_parameter_learns(options, depth):
    for gradient in gradients(make(**options), *text(), depth=depth):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("weight_norm", [False, True])
def test_one_draw_per_forward_pass_shared_by_its_pieces(monkeypatch, weight_norm):
    model = make(subseq_len=3, weight_norm=weight_norm, **DROPOUTS)
    shapes = []
    draw = FrozenDropout.mask

    def recorded(self: FrozenDropout, like: Tensor, shape: Any = None) -> Tensor | None:
        mask = draw(self, like, shape)
        if mask is not None:
            shapes.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(FrozenDropout, "mask", recorded)
    tokens, targets = text()
    first = model(tokens, targets)
    h = HIDDEN + D
    assert len(first.stats) == 3
    assert sorted(shapes) == sorted([(V, 1), (3, 1, D), (3, 1, h), (3, 1, D), (4 * h, h, 2), (4 * h, D, 2)])
    assert not torch.equal(model(tokens, targets).nll, first.nll)
    shapes.clear()
    model.eval()
    assert torch.equal(model(tokens, targets).nll, model(tokens, targets).nll)
    assert shapes == []


def test_the_last_word_learns_from_the_softmax_alone_where_that_is_asked_for():
    tokens, targets = text()
    tokens = torch.where(tokens == 0, V - 1, tokens)
    free, frozen = (make(freeze_last_row=freeze, tie_weights=False) for freeze in (False, True))
    assert torch.equal(free(tokens, targets).nll, frozen(tokens, targets).nll)
    right, quirk = (gradients(model, tokens, targets)[0] for model in (free, frozen))
    assert torch.equal(right[:-1], quirk[:-1])
    assert right[-1].norm() > 0
    assert quirk[-1].norm() == 0


@pytest.mark.parametrize("depth", [None, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 1), (3, 2)])
@torch.no_grad()
def test_a_text_that_grows_has_the_states_of_the_whole_text(depth, kernel):
    model = make(depth=depth, kernel_size=kernel[0], dilation=kernel[1]).eval()
    tokens, targets = text(length=10)
    whole = model.extend(tokens, None).z
    torch.testing.assert_close(
        model.softmax(model.output(whole), targets), model(tokens, targets).nll, rtol=1e-9, atol=1e-9
    )
    for sizes in ([1] * 10, [3, 1, 6], [8, 2]):
        states, cache = [], None
        for piece in tokens.split(sizes, dim=1):
            z, cache, _ = model.extend(piece, cache)
            states.append(z)
        torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-9, atol=1e-9)
        assert cache is not None
        assert cache.words.shape[1] == kernel[0] - 1
        assert all(state.shape[1] <= max((kernel[0] - 1) * kernel[1], 1) for state in cache.states)


def test_generation_continues_a_text():
    model = make(kernel_size=3, dilation=2).eval()
    tokens, _ = text(length=5)
    cached, whole = (next_token_log_prob(model, tokens, cache=cache) for cache in (True, False))
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)
    longer = generate(model, tokens, max_new_tokens=4, temperature=0)
    again = next_token_log_prob(model, longer).argmax(-1)
    assert torch.equal(longer[:, 5:], again[:, 4:-1])


def test_initialisation():
    config = TrellisConfig(
        vocab_size=500, d_embed=32, d_hidden=40, d_output=32, weight_norm=True, tie_weights=False,
        embed_range=0.2, init_std=0.03, inject_std=0.07,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DEQTrellisNetLM(config)
    assert model.block.conv.weight.std().item() == pytest.approx(0.03, rel=0.05)  # and so it is under weight norm
    assert model.inject.weight.std().item() == pytest.approx(0.07, rel=0.05)
    parameters = dict(model.named_parameters())
    for table in (model.embedding.weight, parameters["softmax.weights.0"]):
        assert 0.19 < table.abs().max() <= 0.2
        assert table.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    for bias in (model.block.conv.bias, model.inject.bias, parameters["softmax.biases.0"]):
        assert bias.abs().max() == 0


@pytest.mark.parametrize(("n_experts", "weight_norm"), [(0, False), (0, True), (15, True)])
def test_the_model_of_penn_treebank_has_its_published_size(n_experts, weight_norm):
    """24 million parameters, 20 million of them outside of the embedding (Bai, Kolter & Koltun 2019, table 2)."""
    config = TrellisConfig(
        vocab_size=10_000,
        d_embed=400,
        d_hidden=1000,
        d_output=400,
        kernel_size=2,
        n_experts=n_experts,
        weight_norm=weight_norm,
    )
    with torch.device("meta"):
        model = DEQTrellisNetLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if name.startswith(("softmax.prior", "softmax.latent")))
    total = sum(sizes.values()) - experts
    assert total == pytest.approx(24e6, rel=0.01)
    assert total - sizes["embedding.weight"] == pytest.approx(20e6, rel=0.01)
    assert (experts > 0) == (n_experts > 0)


def test_float32_deepcopy_and_pickle():
    model = make(weight_norm=True).float()
    model.deq.stopping = Stopping(rtol=1e-5)
    tokens, targets = text()
    expected = make(weight_norm=True)(tokens, targets).nll
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nll = twin(tokens, targets).nll
        assert nll.dtype == torch.float32
        torch.testing.assert_close(nll.double(), expected, rtol=1e-3, atol=1e-3)


IMPOSSIBLE = ("vocab_size", "d_embed", "d_hidden", "d_output", "kernel_size", "dilation", "subseq_len", "depth")


@pytest.mark.parametrize(
    "options", [{"n_experts": -1}, {"init_std": 0.0}, {"embed_range": -1.0}, *({name: 0} for name in IMPOSSIBLE)]
)
def test_impossible_config(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        TrellisConfig(**({"vocab_size": V} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_embed": 8, "d_output": 4}, "make the two equal, leave the weights untied, or give n_experts"),
        ({"n_experts": 2, "cutoffs": (3,)}, "a mixture of softmaxes is not split"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        TrellisConfig(vocab_size=V, **options)


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.parametrize("weight_norm", [False, True])
def test_probabilities_are_checked(name, weight_norm):
    with pytest.raises(ValueError, match=r"1\.0; the probability"):
        make(**{"weight_norm": weight_norm, name: 1.0})


def test_inputs_that_do_not_fit_are_refused():
    model = make()
    tokens, targets = text()
    with pytest.raises(ValueError, match="tokens have shape"):
        model(tokens[0], targets[0])
    with pytest.raises(ValueError, match="targets have shape"):
        model(tokens, targets[:, 1:])
    memory = model(tokens, targets).memory
    with pytest.raises(ValueError, match=rf"2 sequences need \(2, 1, {STATE}\).*None at the start of a text"):
        model(tokens[:2], targets[:2], memory)


def test_initialisation_of_our_own_and_as_released():
    """As released: U(±1/√(d_embed k)) for the words, the state's bias as its weight, experts as nn.Linear draws them."""

    def begin(**options: Any) -> DEQTrellisNetLM:
        torch.manual_seed(0)
        sizes = {"d_embed": 32, "d_hidden": 100, "d_output": 28, "n_experts": 3, "init_std": 0.02}
        return DEQTrellisNetLM(TrellisConfig(vocab_size=50, **(sizes | options)))

    ours, theirs = begin(), begin(init_as_released=True)
    assert abs(ours.inject.weight.std().item() - 0.01) < 1e-3
    assert not any(bias.any() for bias in (ours.inject.bias, ours.block.conv.bias, ours.softmax.latent.bias))
    bound = (32 * 2) ** -0.5
    for tensor in (theirs.inject.weight, theirs.inject.bias):
        assert tensor.abs().max() <= bound
        assert abs(tensor.std().item() - bound / 3**0.5) < 0.1 * bound
    assert abs(theirs.block.conv.bias.std().item() - 0.02) < 3e-3
    assert abs(theirs.block.conv.weight.std().item() - 0.02) < 1e-3
    for linear in (theirs.softmax.prior, theirs.softmax.latent):
        assert abs(linear.weight.std().item() - (28 * 3) ** -0.5) < 0.02
        assert linear.bias.any()
