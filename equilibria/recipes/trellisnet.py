"""The DEQ-TrellisNet of the paper on the Penn Treebank, word level."""

from __future__ import annotations

from equilibria.recipes.released import broyden_2019
from equilibria.train.config import DataConfig, OptimConfig, RunConfig, SampleConfig, TrellisModel


def penn_treebank_trellisnet() -> RunConfig:
    """Penn Treebank, word level: the DEQ-TrellisNet of 2019; 57.1 in the paper.

    Bai, Kolter & Koltun 2019 (table 2) give 24 million parameters (20 without embedding); their code has no script.
    Widths, dropouts, optimizer, rate, clipping, decay and batch size are those of TrellisNet on this corpus, which make a
    model of the same size (Bai, Kolter & Koltun, "Trellis Networks for Sequence Modeling", ICLR 2019, and its released
    `word_ptb.py`). Lengths and thresholds are those of the DEQ-TrellisNet on WikiText-103. The number of steps, the warm-up
    of the stack and the annealing of the rate to a thousandth of its start are our choice.
    """
    return RunConfig(
        recipe="penn-treebank-trellisnet",
        model=TrellisModel(
            d_embed=400,
            d_hidden=1_000,
            d_output=400,
            word_dropout=0.1,
            input_dropout=0.45,
            hidden_dropout=0.28,
            output_dropout=0.45,
            weight_dropout=0.5,
            subseq_len=50,
            init_as_released=True,
        ),
        solver=broyden_2019(forward=45, backward=45),
        data=DataConfig(corpus="penn-treebank"),
        optim=OptimConfig(
            optimizer="sgd",
            lr=20.0,
            weight_decay=1.2e-6,
            decay_vectors=True,
            schedule="step-decay",
            warmup_steps=0,
            decay_rate=0.1,
            anneal=10,
            eta_min=0.02,
            clip=0.225,
            steps=200_000,
            batch_size=16,
            length=100,
            pretrain_steps=20_000,
            pretrain_depth=40,
        ),
        sample=SampleConfig(sample_tokens=80),
        twin=False,
        twin_depth=60,
        eval_every=None,
        log_every=100,
        eval_batch_size=10,
    )
