"""Language models that a laptop trains in minutes. The settings are our own."""

from __future__ import annotations

import dataclasses

from equilibria.train.config import (
    CorpusName,
    DataConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    SolveConfig,
    TransformerModel,
    TrellisModel,
)


def quickstart() -> RunConfig:
    """A few minutes on two cores: byte pairs of the documentation that Python carries; no files needed."""
    return RunConfig(
        recipe="quickstart",
        model=TransformerModel(d_model=96, n_head=4, d_inner=384, mem_len=64, init_std=0.1, inject_std=0.1),
        solver=SolveConfig(max_evals=12, eval_max_evals=20, backward_max_evals=8, jacobian_weight=0.5),
        data=DataConfig(corpus="python-docs", vocab_size=2048),
        optim=OptimConfig(lr=5e-3, steps=900, warmup_steps=50, batch_size=16, length=64, pretrain_steps=50),
        eval_every=300,
    )


def text() -> RunConfig:
    """Your own text: --data-dir names a folder of .txt, .jsonl or .parquet files, --dataset a Hugging Face data set."""
    return dataclasses.replace(quickstart(), recipe="text", data=DataConfig(corpus="text"))


def penn_treebank_transformer() -> RunConfig:
    """Penn Treebank, word level: a DEQ-Transformer, a quarter of an hour on a core."""
    return _word_level("penn-treebank-transformer", "penn-treebank", steps=2500)


def wikitext_2_transformer() -> RunConfig:
    """WikiText-2, word level: a DEQ-Transformer, a quarter of an hour on a core."""
    return _word_level("wikitext-2-transformer", "wikitext-2", steps=1200)


def penn_treebank_trellisnet_small() -> RunConfig:
    """Penn Treebank, word level: a small DEQ-TrellisNet, a quarter of an hour on a core."""
    return _small_trellisnet("penn-treebank-trellisnet-small", "penn-treebank", steps=1200)


def wikitext_2_trellisnet() -> RunConfig:
    """WikiText-2, word level: a small DEQ-TrellisNet, ten minutes on a core."""
    return _small_trellisnet("wikitext-2-trellisnet", "wikitext-2", steps=500)


def penn_treebank_char() -> RunConfig:
    """Penn Treebank, character level: a DEQ-Transformer with a memory of 128 characters."""
    config = _word_level("penn-treebank-char", "penn-treebank-char", steps=2500)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mem_len=128),
        optim=dataclasses.replace(config.optim, length=128),
        sample=SampleConfig(sample_tokens=400),
    )


def _word_level(recipe: str, corpus: CorpusName, steps: int) -> RunConfig:
    """Without the Jacobian loss the solves need more and more evaluations as training goes on: within 500 steps they spend
    16 and end at a relative residual near 0.1. With it they stay at about 10."""
    return RunConfig(
        recipe=recipe,
        model=TransformerModel(d_model=128, n_head=4, d_inner=512, mem_len=64, dropout=0.1),
        solver=SolveConfig(max_evals=16, eval_max_evals=30, backward_max_evals=12, jacobian_weight=0.3),
        data=DataConfig(corpus=corpus),
        optim=OptimConfig(
            lr=2e-3, steps=steps, warmup_steps=100, batch_size=16, length=64, pretrain_steps=100, weight_decay=0.1
        ),
        sample=SampleConfig(sample_tokens=80),
        eval_every=500,
    )


def _small_trellisnet(recipe: str, corpus: CorpusName, steps: int) -> RunConfig:
    """A TrellisNet learns the frequencies of words first, if its softmax does not begin with them, and gives up hidden
    units for it: they saturate, the cell adds up, and within 150 steps no solver finds an equilibrium in 60 evaluations.
    Small word vectors (U(±0.1)) lead there as well.

    The cell hands on one position an evaluation, so that long pieces need long solves, the longer the more the model
    remembers. With whole segments and the Jacobian loss at two steps in five the solves spent 16 evaluations from step 50
    on and ended at a residual of 0.5; with pieces of 16 and the loss at every step they take 15 to 20."""
    return RunConfig(
        recipe=recipe,
        model=TrellisModel(embed_range=0.5, init_std=0.05, inject_std=0.05, output_dropout=0.1, subseq_len=16),
        solver=SolveConfig(max_evals=20, eval_max_evals=30, backward_max_evals=12, jacobian_weight=0.2, jacobian_share=1.0),
        data=DataConfig(corpus=corpus),
        optim=OptimConfig(lr=3e-3, steps=steps, warmup_steps=50, batch_size=16, length=64, weight_decay=0.1),
        sample=SampleConfig(sample_tokens=80),
        start_from_frequencies=True,
        eval_every=400,
    )
