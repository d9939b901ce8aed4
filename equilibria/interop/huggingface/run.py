"""From a run folder to a folder of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from equilibria.data import Tokenizer, load_tokenizer
from equilibria.data.disk import refuse_existing, write_folder
from equilibria.interop.huggingface.card import model_card
from equilibria.interop.huggingface.configuration import CONFIGS
from equilibria.interop.huggingface.modeling import MODELS, EquilibriumForCausalLM
from equilibria.interop.huggingface.tokenization import huggingface_tokenizer
from equilibria.train.checkpoint import load_weights
from equilibria.train.config import RunConfig
from equilibria.train.model_config import family
from equilibria.train.run_folder import RunFolder, open_run


def from_run(path: Path | str) -> EquilibriumForCausalLM:
    """The model of a run with its best weights, in evaluation mode, on the CPU.

    UserError where the folder is no run.

        model = from_run("runs/quickstart")
    """
    run = open_run(Path(path))
    return model_of(run, run.load_config(), _vocab_size(run))


def model_of(run: RunFolder, config: RunConfig, vocab_size: int) -> EquilibriumForCausalLM:
    """The model of an opened run, for a vocabulary of that size."""
    name = family(config.model)
    model = MODELS[name](CONFIGS[name].from_run_config(config, vocab_size))
    load_weights(run.weights, model.lm)
    return model.eval()


def write_export(
    target: Path, model: EquilibriumForCausalLM, tokenizer: Tokenizer | None, run: RunFolder, config: RunConfig
) -> PreTrainedTokenizerBase | None:
    """Write all that `from_pretrained` reads, and a model card; returns the tokenizer. UserError if `target` exists."""
    refuse_existing(target)
    theirs = None if tokenizer is None else huggingface_tokenizer(tokenizer)
    # Without documents no token ends a text: an <eos> is the end of a line. Nor is one named for padding then, or
    # `generate` would take those in a prompt for it.
    end = theirs.eos_token_id if theirs is not None and getattr(tokenizer, "end_of_text", None) else None
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if theirs is not None:
            theirs.save_pretrained(folder)
        card = model_card(target.name, model, theirs, config, _summary(run))
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(target, fill)
    return theirs


def _vocab_size(run: RunFolder) -> int:
    """Of the run's tokenizer; a run that was converted without its text has none, but says its size."""
    size = run.vocab_size_without_tokenizer()
    return load_tokenizer(run.tokenizer).size if size is None else size


def _summary(run: RunFolder) -> dict[str, Any] | None:
    """What summary.json says of the model; a twin's is with the run that it belongs to."""
    for path, key in ((run.summary, "model"), (run.path.parent / run.summary.name, "twin")):
        if (key == "model" or run.path.name == "twin") and path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get(key)
    return None
