"""Options of the original's training scripts, as far as a checkpoint needs them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from equilibria.interop.original.names import Family
from equilibria.solution import UserError


@dataclass(frozen=True, kw_only=True)
class OriginalOptions:
    """Options of the original's training scripts. None: not given."""

    # What no tensor tells
    tgt_len: int | None = None
    """Transformer: tokens of each lane in one segment; None: 150."""
    mem_len: int | None = None
    """Transformer: positions of earlier segments that a segment sees; None: 150."""
    local_size: int | None = None
    """Transformer: how many positions one position sees, itself included; None or 0: 1000, as in the original."""
    pre_lnorm: bool = False
    """Transformer: layer norm before attention and feed-forward instead of after them."""
    dropatt: float | None = None
    """Transformer of 2021: dropout of attention weights; None: 0. The code of 2019 has the option, but drops none, nor do
    runs made of its checkpoints without --no-as-released."""
    seq_len: int | None = None
    """TrellisNet: tokens of each lane in one segment; None: 100."""
    dilation: int | None = None
    """TrellisNet: positions from one tap of the convolution to the next; None: 1."""
    emb_dropout: float | None = None
    """TrellisNet: dropout of words, for further training; None: 0."""
    dropouti: float | None = None
    """TrellisNet: dropout of word vectors; None: 0."""
    dropouth: float | None = None
    """TrellisNet: dropout of the state inside the convolution; None: 0."""
    dropoutl: float | None = None
    """TrellisNet: dropout of the vectors of a mixture of softmaxes; None: 0."""
    wdrop: float | None = None
    """TrellisNet: dropout of weights; None: 0."""
    dropout: float | None = None
    """Dropout of the Transformer, or of TrellisNet's output, for further training; None: 0."""
    subseq_len: int | None = None
    """Solve a segment in pieces of this length; None or 0: the whole segment at once."""
    cutoffs: tuple[int, ...] | None = None
    """First ids of the clusters of rarer words. The tensors tell, but for a Transformer with clusters and --div-val 1, and
    for a TrellisNet that was trained with a split softmax: the original does not save the vectors of its clusters, which
    start at zero if you give cutoffs here; without cutoffs the softmax is plain."""

    # What the tensors tell: to be compared
    n_token: int | None = None
    """To check: size of the vocabulary."""
    d_embed: int | None = None
    """To check: width of the word vectors."""
    d_model: int | None = None
    """To check, Transformer: width of the state."""
    n_head: int | None = None
    """To check, Transformer: attention heads."""
    d_head: int | None = None
    """To check, Transformer: width of a head."""
    d_inner: int | None = None
    """To check, Transformer: hidden width of the feed-forward part."""
    div_val: int | None = None
    """To check, Transformer: factor by which each cluster's vectors are narrower."""
    nhid: int | None = None
    """To check, TrellisNet: hidden units."""
    nout: int | None = None
    """To check, TrellisNet: output units."""
    ksize: int | None = None
    """To check, TrellisNet: taps of the convolution."""
    n_experts: int | None = None
    """To check, TrellisNet: softmaxes in the mixture."""

    def given(self, family: Family) -> dict[str, object]:
        """Those that were given, which must be options of this family."""
        given = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        others = _TRELLISNET_ONLY if family == "transformer" else _TRANSFORMER_ONLY
        wrong = next((name for name in given if name in others), None)
        if wrong is not None:
            this, other = MODELS[family], MODELS["trellisnet" if family == "transformer" else "transformer"]
            raise UserError(f"{flag(wrong)} is an option of a {other}, but the tensors are those of a {this}")
        return given


MODELS: dict[Family, str] = {"transformer": "DEQ-Transformer", "trellisnet": "DEQ-TrellisNet"}
"""What the two models are called."""

_TRANSFORMER_ONLY = {
    *("tgt_len", "mem_len", "local_size", "pre_lnorm", "dropatt"),
    *("d_model", "n_head", "d_head", "d_inner", "div_val"),
}
_TRELLISNET_ONLY = {
    *("seq_len", "dilation", "emb_dropout", "dropouti", "dropouth", "dropoutl", "wdrop"),
    *("nhid", "nout", "ksize", "n_experts"),
}


def flag(option: str) -> str:
    """As it is typed."""
    return "--" + option.replace("_", "-")


def show(value: object) -> str:
    """As it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
