"""`equilibria export`: the folder holds the very model of the run, for whoever loads it."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equilibria.cli import main as entry
from equilibria.cli.load import load_run
from equilibria.cli.main import main
from equilibria.interop.huggingface import from_run
from equilibria.models import next_token_log_prob
from equilibria.recipes.build import build_model
from equilibria.train.checkpoint import save_checkpoint
from equilibria.train.config import DataConfig, RunConfig, TrellisModel
from equilibria.train.run_folder import RunFolder

Failure = Callable[..., str]
PROMPT = "the small cat sees"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "small"
    assert main(["export", str(trained), str(folder)]) == 0
    return folder


@torch.no_grad()
def test_the_log_probabilities_are_those_of_the_run(trained: Path, exported: Path) -> None:
    run = load_run(trained)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = torch.tensor([run.tokenizer.encode(PROMPT)])
    assert tokenizer(PROMPT)["input_ids"] == tokens[0].tolist()
    expected = next_token_log_prob(run.model(), tokens)
    loaded: Any = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(loaded(tokens).logits, expected)
    assert torch.equal(from_run(trained)(tokens).logits, expected)  # pyright: ignore[reportAttributeAccessIssue]
    assert loaded.config.eval_stopping() == run.model().deq.eval_stopping


@torch.no_grad()
def test_a_split_read_with_memory_has_the_loss_of_eval(trained: Path, exported: Path) -> None:
    run = load_run(trained)
    corpus = run.corpus()
    expected = run.evaluate(corpus, "test")
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    batches = corpus.test.batches(min(run.config.eval_batch_size, corpus.test.max_batch_size), run.config.eval_segment)
    total, memory = 0.0, None
    for tokens, targets in (batches[i] for i in range(len(batches))):
        output = model(tokens, memory=model.empty_memory(len(tokens)) if memory is None else memory)
        total -= output.logits.gather(-1, targets[..., None].long()).sum().item()
        memory = output.memory
    assert total / expected.tokens == pytest.approx(expected.nll, rel=1e-6)


def test_what_the_folder_holds(trained: Path, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "equilibria_model.py"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    generation = json.loads((exported / "generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(exported).eos_token
    assert ("eos_token_id" in generation) == (end == "<|endoftext|>")
    test = json.loads((trained / "summary.json").read_text())["model"]["test"]
    card = (exported / "README.md").read_text()
    assert f"| test perplexity per token | {test['perplexity']:.4g} |" in card
    assert f"| evaluations of the layer per solve | {test['evaluations']:.4g} |" in card
    weights = load_file(exported / "model.safetensors")
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} parameters" in card


def test_the_twin_is_exported_with_its_own_figures(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained / "twin"), str(tmp_path / "twin")]) == 0
    test = json.loads((trained / "summary.json").read_text())["twin"]["test"]
    card = (tmp_path / "twin" / "README.md").read_text()
    assert f"| test perplexity per token | {test['perplexity']:.4g} |" in card
    assert "applied 2 times" in card
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    assert model(torch.tensor([[1, 2, 3]])).stats == []


@pytest.mark.parametrize("imported", [True, False])
def test_it_loads_with_and_without_our_import(exported: Path, tmp_path: Path, imported: bool) -> None:
    code = f"""
{"import equilibria.interop.huggingface" if imported else ""}
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}{"" if imported else ", trust_remote_code=True"})
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
model.save_pretrained({str(tmp_path / "again")!r})
print(type(model).__module__, model.generate(**tokenizer({PROMPT!r}, return_tensors="pt"), max_new_tokens=3).shape[1])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    length = len(AutoTokenizer.from_pretrained(exported)(PROMPT)["input_ids"])
    assert result.stdout.split() == ["equilibria.interop.huggingface.modeling", str(length + 3)]
    written = {path.name for path in (tmp_path / "again").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", "equilibria_model.py"}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "equilibria_model.DEQTransformerConfig",
        "AutoModelForCausalLM": "equilibria_model.DEQTransformerForCausalLM",
    }


def test_a_converted_run_has_no_tokenizer_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `equilibria convert` leaves it without --data-dir."""
    shape = TrellisModel(d_embed=6, d_hidden=5, d_output=6)
    config = RunConfig(recipe="converted", model=shape, data=DataConfig(corpus="penn-treebank"), twin=False)
    run = RunFolder(tmp_path / "run")
    run.store_config(config)
    model = build_model(config, 30).eval()
    save_checkpoint(run.best, {"vocab_size": 30}, model=model.state_dict())
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 0
    assert "tokenizer  none" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("tokenizer*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured" in card
    assert "There is no tokenizer here" in card
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(30, (2, 6))
    assert torch.equal(loaded(tokens).logits, next_token_log_prob(model, tokens))


def test_mistakes_are_one_line_and_leave_nothing(trained: Path, exported: Path, tmp_path: Path, failure: Failure) -> None:
    assert f"{exported} exists already" in failure("export", trained, exported)
    assert "missing: RUN, FOLDER" in failure("export")
    assert "there is no run folder" in failure("export", tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_its_extra(trained: Path, failure: Failure, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.startswith(("equilibria.cli.", "equilibria.interop.huggingface")) and name != entry.__name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    said = 'the package transformers is missing; install it with: pip install "equilibria[hf]"'
    assert said in failure("export", trained, "out")
