"""A whole run through the command line, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equilibria.cli.evaluate import EvalOptions, evaluate_run
from equilibria.cli.load import load_run
from equilibria.cli.main import main
from equilibria.data import load_tokenizer
from equilibria.solution import UserError
from equilibria.train.checkpoint import load_state
from equilibria.train.config import TransformerModel, TrellisModel, load_config
from equilibria.train.run_folder import RunFolder, read_metrics


def test_every_artefact_is_there_and_valid(trained: Path):
    config = load_config(trained / "config.json")
    assert isinstance(config.model, TransformerModel)
    assert (config.recipe, config.model.d_model, config.optim.steps) == ("text", 16, 6)
    tokenizer = load_tokenizer(trained / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    for folder in (trained, trained / "twin"):
        for part in ("checkpoints/step-00000003", "checkpoints/step-00000006", "best"):
            assert all(tensor.isfinite().all() for tensor in load_file(folder / part / "model.safetensors").values())
        assert len(list((folder / "checkpoints").iterdir())) == 2
    assert load_config(trained / "twin" / "config.json").model.depth == 2
    assert not list(trained.rglob(".*")), "leftovers of atomic writes"
    text = (trained / "sample.txt").read_text(encoding="utf-8")
    assert "tokens 12, temperature 0.8" in text


def test_plots_are_images_that_are_not_blank(trained: Path):
    for name in ("loss", "residual", "evaluations"):
        with Image.open(trained / "plots" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 50


def test_metrics_tell_the_phases_apart(trained: Path):
    rows = read_metrics(trained / "metrics.jsonl")
    train = {row["step"]: row for row in rows if "train/loss" in row}
    assert sorted(train) == [1, 2, 3, 4, 5, 6]
    assert all("forward/evaluations" not in train[step] for step in (1, 2)), "the warm-up stack solves nothing"
    for step in (3, 4, 5, 6):
        assert 1 <= train[step]["forward/evaluations"] <= 6
        assert 1 <= train[step]["backward/evaluations"] <= 4
        assert train[step]["forward/residual"] > 0
    assert [row["step"] for row in rows if "valid/loss" in row] == [3, 6]
    twin = read_metrics(trained / "twin" / "metrics.jsonl")
    assert all("forward/evaluations" not in row for row in twin)


def test_twin_saw_the_same_tokens(trained: Path):
    def state(folder: Path) -> dict:
        return load_state(RunFolder(folder).checkpoints.path(6))

    mine, twins = state(trained), state(trained / "twin")
    assert [mine[key] for key in ("step", "tokens", "epoch", "segment")] == [
        twins[key] for key in ("step", "tokens", "epoch", "segment")
    ]


def test_tensorboard_holds_the_metrics(trained: Path):
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    for row in read_metrics(trained / "metrics.jsonl"):
        if "train/loss" in row:
            assert logged[row["step"]] == pytest.approx(row["train/loss"], rel=1e-6)


@pytest.mark.parametrize(("part", "folder"), [("model", "."), ("twin", "twin")])
def test_summary_is_what_eval_finds(trained: Path, part: str, folder: str):
    summary = json.loads((trained / "summary.json").read_text())
    again = evaluate_run(EvalOptions(run=trained / folder))
    for key in ("nll", "perplexity", "bits_per_byte", "tokens", "evaluations", "residual", "unconverged"):
        assert summary[part]["test"][key] == getattr(again, key)
    assert summary["model"]["parameters"] == summary["twin"]["parameters"]
    assert summary["xz_bits_per_byte"] > 0


def test_eval_prints_its_result_and_takes_a_tolerance(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(trained), "--split", "valid"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    loose = evaluate_run(EvalOptions(run=trained, rtol=0.5))
    tight = evaluate_run(EvalOptions(run=trained, rtol=1e-4, max_evals=40))
    assert loose.evaluations is not None
    assert tight.evaluations is not None
    assert loose.evaluations < tight.evaluations


def test_eval_reads_a_split_as_told(trained: Path):
    usual = evaluate_run(EvalOptions(run=trained))
    part = evaluate_run(EvalOptions(run=trained, batch_size=2, length=5, max_steps=3))
    assert part.tokens == 2 * 5 * 3
    assert evaluate_run(EvalOptions(run=trained, batch_size=1)).tokens > usual.tokens
    losses = {evaluate_run(EvalOptions(run=trained, mem_len=length, max_evals=40)).nll for length in (0, 3, 8)}
    assert len(losses) == 3
    assert evaluate_run(EvalOptions(run=trained, mem_len=8)).nll == usual.nll


def test_generate_continues_the_prompt(trained: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["generate", str(trained), "--prompt", "the cat", "--tokens", "8"]
    assert main([*argv, "--compare"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("the cat")
    assert first.err.count("tokens/s") == 2
    assert main(argv) == 0
    assert capsys.readouterr().out == first.out, "the same seed gives the same text"


def test_greedy_generation_is_the_same_with_and_without_cache(trained: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["generate", str(trained / "twin"), "--prompt", "a dog", "--tokens", "6", "--temperature", "0"]
    assert main(argv) == 0
    cached = capsys.readouterr().out
    assert main([*argv, "--no-cache"]) == 0
    assert capsys.readouterr().out == cached


def test_final_screen_names_what_counts(
    trained: Path, text_dir: Path, small: list[str], capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    assert main(["train", "text", "--resume", "--run-dir", str(trained)]) == 0  # finished: evaluates and reports again
    screen = capsys.readouterr().out
    for words in ("test bits per byte", "xz -9", "twin, 2 blocks", "evaluations of f per solve", "residual", "peak memory"):
        assert words in screen
    assert str(trained) in screen
    assert "equilibria generate" in screen
    assert len(screen.splitlines()) <= 24


def test_new_runs_do_not_touch_old_ones(text_dir: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "text", "--data-dir", str(text_dir), *small, "--steps", "1", "--no-twin"]
    assert main(argv) == 0
    before = (tmp_path / "runs/text/metrics.jsonl").read_bytes()
    assert main([*argv, "--seed", "1"]) == 0
    assert (tmp_path / "runs/text/metrics.jsonl").read_bytes() == before
    assert main(["train", "text", "--resume", "--steps", "2"]) == 0  # the newest of this recipe
    assert load_config(tmp_path / "runs/text-2/config.json").optim.steps == 2
    assert load_config(tmp_path / "runs/text/config.json").optim.steps == 1
    assert [row["step"] for row in read_metrics(tmp_path / "runs/text-2/metrics.jsonl") if "train/loss" in row] == [1, 2]
    assert not (tmp_path / "runs/text/twin").exists()


def test_trellisnet_trains_evaluates_and_writes(
    text_dir: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "trellis"
    options = [option for pair in zip(small[::2], small[1::2], strict=True) for option in pair
               if pair[0] not in ("--d-model", "--d-inner", "--n-head", "--mem-len")]  # fmt: skip
    argv = ["train", "wikitext-103-trellisnet", "--scale", "0.01", "--corpus", "text", "--data-dir", str(text_dir)]
    argv += ["--cutoffs", "100", "200", "--subseq-len", "5", "--twin", "--run-dir", str(run), *options]
    assert main(argv) == 0
    config = load_config(run / "config.json")
    assert isinstance(config.model, TrellisModel)
    assert (config.model.d_hidden, config.model.d_embed, config.optim.steps) == (16, 5, 6)
    assert load_config(run / "twin" / "config.json").model == dataclasses.replace(config.model, depth=2)
    assert (run / "plots" / "residual.png").is_file()
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "wikitext-103-trellisnet", "--resume", "--run-dir", str(run)]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert main(["eval", str(run)]) == 0
    with pytest.raises(UserError, match="--mem-len is 3, but a TrellisNet"):
        evaluate_run(EvalOptions(run=run, mem_len=3))
    capsys.readouterr()
    texts = []
    for way in ("--cache", "--no-cache"):
        assert main(["generate", str(run), "--prompt", "the cat", "--tokens", "6", "--temperature", "0", way]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_copy_memory_needs_no_files_and_leaves_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "copy"
    argv = ["train", "copy-memory", "--delay", "2", "--length", "22", "--d-model", "8", "--steps", "3", "--max-evals", "4"]
    argv += ["--pretrain-steps", "1", "--eval-max-evals", "4", "--max-eval-steps", "2", "--eval-batch-size", "500"]
    assert main([*argv, "--run-dir", str(run)]) == 0
    screen = capsys.readouterr().out
    assert "nats per token" in screen
    assert "bits per byte" not in screen
    assert "generate" not in screen
    assert not (run / "sample.txt").exists()
    assert main(["eval", str(run)]) == 0
    assert "bits per byte" not in capsys.readouterr().out


def test_help_lists_the_options_of_one_family(capsys: pytest.CaptureFixture[str]):
    for recipe, mine, others in (
        ("quickstart", "--n-head", "--d-hidden"),
        ("penn-treebank-trellisnet", "--d-hidden", "--n-head"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", recipe, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert mine in text
        assert others not in text


LONG_COPY = "--delay 80 --length 100 --d-model 8 --max-evals 4 --eval-max-evals 4 --max-eval-steps 1"


@pytest.mark.parametrize("recipe", ["text", "copy-memory"])
def test_a_run_can_begin_with_the_frequencies(recipe: str, text_dir: Path, small: list[str], tmp_path: Path):
    """Then the first loss is the entropy of single tokens, and not that of the uniform distribution."""
    options = ["--data-dir", str(text_dir), *small] if recipe == "text" else LONG_COPY.split()
    losses = []
    for start in ("--start-from-frequencies", "--no-start-from-frequencies"):
        run = tmp_path / start
        argv = ["train", recipe, "--run-dir", str(run), *options, "--steps", "1", "--log-every", "1", "--no-twin", start]
        assert main(argv) == 0
        losses.append(next(row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row))
    assert losses[0] < 0.8 * losses[1]


def test_explicit_model_can_be_trained_alone(text_dir: Path, small: list[str], tmp_path: Path):
    run = tmp_path / "stack"
    argv = ["train", "text", "--data-dir", str(text_dir), "--run-dir", str(run), *small, "--depth", "3", "--steps", "1"]
    assert main(argv) == 0
    assert not (run / "twin").exists()
    assert not (run / "plots" / "residual.png").exists()
    assert main(["eval", str(run)]) == 0


def test_accumulated_steps_read_more_text(text_dir: Path, small: list[str], tmp_path: Path):
    argv = ["train", "text", "--data-dir", str(text_dir), *small, "--no-twin", "--steps", "2", "--pretrain-steps", "0"]
    assert main([*argv, "--run-dir", str(tmp_path / "two"), "--accumulate", "2"]) == 0
    state = RunFolder(tmp_path / "two").checkpoints.newest(load_state)
    assert (state["step"], state["segment"], state["tokens"]) == (2, 4, 2 * 2 * 4 * 8)
    model = load_run(tmp_path / "two").model()
    assert next(model.parameters()).dtype == torch.float32


def test_mixed_precision(text_dir: Path, small: list[str], tmp_path: Path):
    """In a process of its own: Accelerate fixes the precision of a process once."""
    run = tmp_path / "bf16"
    argv = ["train", "text", "--data-dir", str(text_dir), "--run-dir", str(run), *small, "--no-twin", "--precision", "bf16"]
    subprocess.run([sys.executable, "-W", "error", "-m", "equilibria", *argv], check=True, capture_output=True)
    losses = [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert len(losses) == 6
    assert all(4 < loss < 7 for loss in losses)
    assert {tensor.dtype for tensor in load_file(run / "best" / "model.safetensors").values()} == {torch.float32}


def test_a_run_can_begin_with_the_model_of_another(trained: Path, text_dir: Path, tmp_path: Path, failure):
    """A recipe for another size takes the sizes of the run that is loaded, and all of its weights."""
    options = ["--load", str(trained), "--data-dir", str(text_dir), "--vocab-size", "300", "--no-twin", "--threads", "1"]
    few = ["--lr", "1e-9", "--steps", "1", "--eval-every", "1", "--batch-size", "4", "--length", "8"]
    few.append("--start-from-frequencies")
    assert main(["train", "text", *options, *few, "--run-dir", str(tmp_path / "more")]) == 0
    assert load_config(tmp_path / "more" / "config.json").model == load_config(trained / "config.json").model
    before, after = (load_file(folder / "best" / "model.safetensors") for folder in (trained, tmp_path / "more"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    wider = failure("train", "text", *options, "--d-model", "32", "--run-dir", tmp_path / "wider")
    assert "holds another model" in wider
    assert not (tmp_path / "wider").exists()
    other = tmp_path / "other"
    shutil.copytree(text_dir, other)
    (other / "train.txt").write_text((text_dir / "train.txt").read_text().replace("cat", "cow"))
    options[options.index(str(text_dir))] = str(other)
    assert "gives another vocabulary than the one in" in failure("train", "text", *options, "--run-dir", tmp_path / "cows")
    assert not (tmp_path / "cows").exists()
    options[options.index(str(other))] = str(text_dir)
    assert main(["train", "text", *options, *few, "--resume", "--run-dir", str(tmp_path / "more"), "--steps", "2"]) == 0
    assert "there is no run folder" in failure("train", "text", "--load", tmp_path / "nowhere", "--data-dir", text_dir)


def test_eval_estimates_the_spectral_radius_at_the_equilibrium(trained: Path, capsys: pytest.CaptureFixture[str], failure):
    assert main(["eval", str(trained), "--max-steps", "1", "--spectral-radius"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "spectral radius" in line)
    mean, most = (float(word.strip(",")) for word in line.split() if word[0].isdigit())
    assert 0 < mean <= most < 2
    assert "explicit stack" in failure("eval", trained / "twin", "--max-steps", "1", "--spectral-radius")


def test_the_command_of_a_scaled_run_resumes_it(text_dir: Path, small: list[str], tmp_path: Path, failure):
    argv = ["train", "text", "--scale", "0.5", "--data-dir", str(text_dir), "--run-dir", str(tmp_path / "run"), "--no-twin"]
    few = ["--vocab-size", "300", "--batch-size", "4", "--length", "8", "--steps", "1", "--threads", "1"]
    assert main([*argv, *few]) == 0
    assert main([*argv, *few, "--resume", "--steps", "2"]) == 0
    assert "which is not that of --scale 0.25" in failure(*argv, *few, "--resume", "--scale", "0.25")


def test_a_run_of_the_reversible_method_is_drawn_and_described(text_dir: Path, small: list[str], tmp_path: Path):
    argv = ["train", "text", "--data-dir", str(text_dir), "--run-dir", str(tmp_path / "run"), *small, "--no-twin"]
    assert main([*argv, "--method", "reversible", "--damping", "0.5", "--backward", "reversible"]) == 0
    assert (tmp_path / "run" / "plots" / "residual.png").is_file()
    assert (tmp_path / "run" / "summary.json").is_file()
