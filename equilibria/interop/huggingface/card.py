"""The model card of an exported folder: what the model is, what was measured, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from equilibria.interop.huggingface.modeling import EquilibriumForCausalLM
from equilibria.train.config import RunConfig
from equilibria.train.model_config import family

NAMES = {"transformer": "DEQ-Transformer", "trellisnet": "DEQ-TrellisNet"}


def model_card(
    name: str,
    model: EquilibriumForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    summary: Mapping[str, Any] | None,
) -> str:
    """README.md. `summary` is what the run measured of this model; None where it measured nothing."""
    depth = config.model.depth
    how = "solved for its fixed point" if depth is None else f"applied {depth} times, with one set of weights"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    what = f"A {NAMES[family(config.model)]} language model with {parameters:,} parameters: one layer, {how}."
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [deep-equilibrium, equilibria]",
            "---",
            "",
            f"# {name}",
            "",
            f"{what} Trained with equilibria on {config.data.corpus}.",
            "",
            "## Measured",
            "",
            *(_measured(summary) if summary else ["Nothing was measured when this folder was written."]),
            "",
            "## Use",
            "",
            "```python",
            "import equilibria.interop.huggingface  # or pass trust_remote_code=True",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            *([f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if tokenizer is not None else []),
            "```",
            "",
            'Both need the package: `pip install "equilibria[hf]"`. '
            + ("" if tokenizer is not None else "There is no tokenizer here: the run was converted without its text. ")
            + _ending(model),
            "",
        ]
    )


def _ending(model: EquilibriumForCausalLM) -> str:
    settings = model.generation_config
    if settings is None or settings.eos_token_id is None:
        return "A text is continued without end: no token stops it."
    return "The token between documents ends a text."


def _measured(summary: Mapping[str, Any]) -> list[str]:
    test = summary["test"]
    rows = [
        ("test loss, nats per token", _number(test["nll"])),
        ("test perplexity per token", _number(test["perplexity"])),
        ("test bits per byte", _number(test["bits_per_byte"])),
        ("tokens of the test", f"{test['tokens']:,}"),
        ("evaluations of the layer per solve", _number(test["evaluations"])),
        ("relative residual of the solves", _number(test["residual"])),
        ("share of samples above the tolerance", _number(test["unconverged"])),
        ("training steps", f"{summary['steps']:,}"),
        ("training tokens", f"{summary['tokens']:,}"),
    ]
    shown = [f"| {name} | {value} |" for name, value in rows if value is not None]
    read = "The test split is read once, in segments with the memory carried on, at the tolerances of config.json."
    return ["| | |", "|---|---|", *shown, "", read]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
