"""The lm-evaluation-harness on our models, on small tasks of our own: its numbers are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.data import Vocabulary
from equilibria.interop.huggingface import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    DEQTrellisNetConfig,
    DEQTrellisNetForCausalLM,
    huggingface_tokenizer,
)
from equilibria.models import generate, next_token_log_prob

WORDS = Vocabulary(["<eos>", "<unk>", *["the", "a", "cat", "dog", "sees", "hears", "small", "old", "house", "tree", "."]])
QUESTIONS = ["the small cat", "a dog", "the old house hears a"]
CHOICES = [["sees", "dog house", "the old tree"], ["hears", "cat .", "tree"], ["cat", "old dog .", "."]]
TEXTS = ["the cat sees a dog . a small dog hears the old tree .", "a house"]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "greedy": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "the",
        "generation_kwargs": {"until": ["no word of ours"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [{"question": q, "choices": c, "answer": i} for i, (q, c) in enumerate(zip(QUESTIONS, CHOICES, strict=True))],
    "rolling": [{"text": text} for text in TEXTS],
    "greedy": [{"question": question} for question in QUESTIONS],
}
SOLVES: dict[str, Any] = {"vocab_size": WORDS.size, "rtol": 1e-6, "atol": 0.0, "max_evals": 100}
MODELS: dict[str, Any] = {
    "transformer": (DEQTransformerForCausalLM, DEQTransformerConfig, {"d_model": 16, "n_head": 2, "d_inner": 12}),
    "trellisnet": (DEQTrellisNetForCausalLM, DEQTrellisNetConfig, {"d_embed": 8, "d_output": 8, "embed_range": 1.0}),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    model, config, shape = MODELS[family]
    made = model(config(**SOLVES, **shape)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # a new Transformer is nearly the identity, and slow to solve
            parameter.add_(0.1 * torch.randn_like(parameter)).mul_(6 if "inject" in name else 1)
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}", **source, **task}))  # JSON is YAML
    return folder


@pytest.fixture
def harness(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the tasks, with the network out of reach."""
    import datasets.config as settings
    import huggingface_hub.constants

    monkeypatch.setattr(settings, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", tmp_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness_model: Any = HFLM  # their decorators hide what they take
    evaluate: Any = simple_evaluate

    def run(model: Any) -> dict[str, Any]:
        wrapped: Any = harness_model(pretrained=model, tokenizer=huggingface_tokenizer(WORDS), batch_size=2, max_length=32)
        found: Any = evaluate(
            model=wrapped,
            tasks=[f"local_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        return found

    return run


@torch.no_grad()
def log_prob(model: Any, context: list[int], continuation: list[int]) -> float:
    tokens = torch.tensor([[*context, *continuation]])
    after = next_token_log_prob(model.lm, tokens)[0, len(context) - 1 : -1]
    return after.gather(-1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::DeprecationWarning:datasets")
@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_its_numbers_are_ours(harness: Any, family: str) -> None:
    model = make(family)
    found = harness(model)
    right = 0
    for sample in found["samples"]["local_choice"]:
        question, choices = WORDS.encode(sample["doc"]["question"]), sample["doc"]["choices"]
        expected = [log_prob(model, question, WORDS.encode(choice)) for choice in choices]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == sample["doc"]["answer"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(right / 3)
    for sample in found["samples"]["local_rolling"]:  # after <eos>, the prefix of an empty context
        expected = log_prob(model, WORDS.encode("\n"), WORDS.encode(sample["doc"]["text"]))
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-3)
    for sample in found["samples"]["local_greedy"]:
        prompt = torch.tensor([WORDS.encode(sample["doc"]["question"])])
        longer = generate(model.lm, prompt, max_new_tokens=4, temperature=0)[0, prompt.shape[1] :].tolist()
        words = " ".join(WORDS.words[i] for i in longer).split("<eos>")[0].split()  # where the harness stops
        assert sample["resps"][0][0].split() == [word for word in words if word != "<unk>"]
