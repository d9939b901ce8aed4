"""Reading a run folder back: its configuration, tokenizer and weights."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from equilibria.data import Corpus, Tokenizer, load_tokenizer
from equilibria.models import EquilibriumLM
from equilibria.recipes.build import build_corpus, build_model
from equilibria.solution import UserError
from equilibria.train.checkpoint import load_weights
from equilibria.train.config import DataConfig, MethodName, RunConfig
from equilibria.train.evaluate import Evaluation, evaluate
from equilibria.train.run_folder import RunFolder, open_run


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What one needs of a finished run."""

    folder: RunFolder
    config: RunConfig
    tokenizer: Tokenizer
    read: tuple[DataConfig, Corpus] | None = None
    """The corpus that was read for its tokenizer, of a run that has none of its own."""

    def model(self, *, method: MethodName | None = None) -> EquilibriumLM:
        """The model with its best weights, ready to evaluate; `method` as in `build_model`."""
        model = build_model(self.config, self.tokenizer.size, method=method)
        load_weights(self.folder.weights, model)
        return model.to(device()).eval()

    def corpus(self, data_dir: Path | None = None) -> Corpus:
        """The corpus of the run, which must give the same tokens; `data_dir` says where it is now."""
        data = with_own_tokenizer(_with_data_dir(self.config.data, data_dir), self.folder)
        if self.read is not None and self.read[0] == data:
            return self.read[1]
        corpus = build_corpus(data)
        check_vocabulary(self.folder, corpus, data)
        return corpus

    def evaluate(self, corpus: Corpus, split: str, *, max_steps: int | None = None) -> Evaluation:
        """How well the best weights predict a split, by name, in float32; `max_steps` as in `evaluate`."""
        return evaluate(
            self.model(),
            getattr(corpus, split),
            batch_size=self.config.eval_batch_size,
            length=self.config.eval_segment,
            device=device(),
            max_steps=max_steps,
        )


def load_run(path: Path, data_dir: Path | None = None) -> LoadedRun:
    """Open a run folder; a UserError says what is wrong with it.

    A run that was converted without its text has no tokenizer of its own: it is that of the text in `data_dir`.
    """
    folder = open_run(path)
    config = folder.load_config()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    size = folder.vocab_size_without_tokenizer()
    if size is None:
        return LoadedRun(folder=folder, config=config, tokenizer=load_tokenizer(folder.tokenizer))
    data = _with_data_dir(config.data, data_dir)
    corpus = _corpus_of(path, data, size)
    return LoadedRun(folder=folder, config=config, tokenizer=corpus.tokenizer, read=(data, corpus))


def check_vocabulary(folder: RunFolder, corpus: Corpus, data: DataConfig) -> None:
    """Raise UserError if a run has another tokenizer than the corpus that `data` names; it may have none of its own."""
    if not folder.tokenizer.is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        corpus.tokenizer.save(Path(scratch))
        for path in Path(scratch).iterdir():
            stored = folder.tokenizer / path.name
            if not stored.is_file() or stored.read_bytes() != path.read_bytes():
                where = "this installation" if data.data_dir is None else str(data.data_dir)
                raise UserError(
                    f"the text of {data.corpus} in {where} gives another vocabulary than the one in {folder.path}; "
                    "use the text that the run was trained on"
                )


def with_own_tokenizer(data: DataConfig, folder: RunFolder) -> DataConfig:
    """A tokenizer made elsewhere is that of the run folder, which needs nothing else."""
    if data.text.tokenizer is None or not folder.tokenizer.is_dir():
        return data
    return dataclasses.replace(data, text=dataclasses.replace(data.text, tokenizer=str(folder.tokenizer)))


def _corpus_of(run: Path, data: DataConfig, size: int) -> Corpus:
    try:
        corpus = build_corpus(data)
    except UserError as error:
        raise UserError(f"{run} has no tokenizer, for it was converted without its text: {error}") from error
    if corpus.tokenizer.size != size:
        where = "" if data.data_dir is None else f" in {data.data_dir}"
        raise UserError(
            f"the text of {data.corpus}{where} has a vocabulary of {corpus.tokenizer.size:,}, but the model of {run} one "
            f"of {size:,}; use the text that it was trained on"
        )
    return corpus


def _with_data_dir(data: DataConfig, data_dir: Path | None) -> DataConfig:
    """Files in place of a data set, too: the exported text, say."""
    if data_dir is None:
        return data
    text = dataclasses.replace(data.text, dataset=None, dataset_config=None, streaming=False)
    return dataclasses.replace(data, data_dir=data_dir, text=text)


def device() -> torch.device:
    """The device that Accelerate chooses."""
    chosen = PartialState().device
    assert chosen is not None
    return chosen
