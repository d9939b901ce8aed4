"""What a run leaves when training is over: test results, plots, a sample of text, and the summary."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from equilibria.cli.generate import encode_prompt, generate_ids, text_pieces
from equilibria.cli.load import LoadedRun, device, load_run
from equilibria.data import Corpus
from equilibria.models import EquilibriumLM
from equilibria.train.checkpoint import load_state
from equilibria.train.config import MethodName, RunConfig
from equilibria.train.interrupt import StopRequest
from equilibria.train.plots import plot_evaluations, plot_loss, plot_residual
from equilibria.train.report import describe_model, render, xz_bits_per_byte
from equilibria.train.run_folder import RunFolder, read_metrics
from equilibria.train.shown import shown_path
from equilibria.train.solves import eval_stopping, trace_stopping
from equilibria.train.state import TrainState
from equilibria.train.traces import relative_trace, trace_solve
from equilibria.train.typed import options_of


def finish(config: RunConfig, corpus: Corpus, folder: RunFolder, stop: StopRequest) -> str:
    """Write everything that follows training into the run folder and return the final screen."""
    summary: dict[str, Any] = {
        "recipe": config.recipe,
        "folder": shown_path(folder.path),
        "xz_bits_per_byte": None if corpus.test_text is None else xz_bits_per_byte(corpus.test_text),
        "sample": corpus.test.text_bytes is not None,
    }
    run = load_run(folder.path)
    summary["model"] = _describe(run, corpus)
    stop.check()
    if config.wants_twin:
        summary["twin"] = _describe(load_run(folder.twin.path), corpus)
        stop.check()
    _plot(run, corpus)
    if corpus.test.text_bytes is not None:
        folder.sample.write_text(_sample(run, corpus), encoding="utf-8")
    stop.check()
    summary["seconds"] = sum(_state(part).seconds for part in (folder, folder.twin) if part.has_checkpoint())
    folder.write_summary(summary)
    return render(summary, config, options_of(folder.command))


def _describe(run: LoadedRun, corpus: Corpus) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in run.model().parameters())
    test = run.evaluate(corpus, "test")
    rows = read_metrics(run.folder.metrics)
    return describe_model(parameters, run.config.model.depth, _state(run.folder), rows, test)


def _state(folder: RunFolder) -> TrainState:
    return TrainState.from_json(folder.checkpoints.newest(load_state))


def _plot(run: LoadedRun, corpus: Corpus) -> None:
    config, folder = run.config, run.folder
    rows, plots = read_metrics(folder.metrics), folder.plots
    plot_loss(plots / "loss.png", rows, read_metrics(folder.twin.metrics) if config.wants_twin else ())
    if config.model.depth is not None:
        return  # a stack solves nothing
    plot_evaluations(
        plots / "evaluations.png",
        rows,
        budget=config.solver.max_evals,
        twin_depth=config.twin_depth if config.wants_twin else None,
    )
    compared: set[MethodName] = {"anderson", "broyden", "picard", config.solver.method}
    traces = {method: _trace(run.model(method=method), run, corpus) for method in sorted(compared)}
    rtol = eval_stopping(config.solver).rtol
    plot_residual(plots / "residual.png", traces, chosen=config.solver.method, rtol=rtol)


def _trace(model: EquilibriumLM, run: LoadedRun, corpus: Corpus) -> torch.Tensor:
    """(1 + steps, B) residuals of a solve on validation text."""
    config = run.config
    stats = trace_solve(
        model,
        corpus.valid,
        trace_stopping(config.solver),
        batch_size=config.eval_batch_size,
        length=config.eval_segment,
        device=device(),
    )
    return relative_trace(stats)


def _sample(run: LoadedRun, corpus: Corpus) -> str:
    """A prompt and how the model continues it."""
    settings = run.config.sample
    prompt = settings.sample_prompt or run.tokenizer.decode(corpus.valid.tokens[:24].tolist())
    ids = encode_prompt(run.tokenizer, prompt)
    new = generate_ids(
        run.model(),
        ids,
        settings.sample_tokens,
        settings.sample_temperature,
        settings.sample_top_k,
        None,
        torch.Generator(device()).manual_seed(run.config.seed),
    )
    text = "".join(text_pieces(run.tokenizer, ids, new))
    asked = ", ".join(f"{key.removeprefix('sample_')} {value}" for key, value in dataclasses.asdict(settings).items()
                      if key != "sample_prompt")  # fmt: skip
    return f"{prompt}{text}\n\n[the first {len(ids)} tokens are the prompt; {asked}]\n"
