"""The page on runs: whole, self-contained, and there for every kind of run."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CONFIG, with_optim

from equilibria.cli.main import main
from equilibria.solution import UserError
from equilibria.train.config import RunConfig, to_json
from equilibria.train.html import write_report
from equilibria.train.html.drawing import MOST_POINTS, RUN, Drawing
from equilibria.train.html.reading import read_runs
from equilibria.train.html.tables import comparison, differences, remedy_parts, state

VOID = {"meta", "br", "hr", "img", "input", "link"}
TEST = {"nll": 1.5, "perplexity": 4.5, "bits_per_byte": 2.25, "evaluations": 6.0, "residual": 0.01, "unconverged": 0.0}
MODEL = {
    "depth": None, "parameters": 1234, "steps": 14, "tokens": 210, "best_step": 12, "train_seconds": 75.0,
    "tokens_per_second": 2.8, "peak_memory_bytes": 2**28, "test": TEST,
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page, and complains of what is not closed or not its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids)), "two elements have one id"
        assert "script" not in self.tags
        assert not re.search(r'(?:src|href)="(?!#)', text), "the page asks for something outside of it"
        assert "@import" not in text
        assert not re.search(r"#f[cde]000\d", text), "a colour that stands for another was left in place"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rows(steps: int, *, solves: bool = True) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step, "seconds": float(step), "train/loss": 5 - 0.1 * step, "train/gradient_norm": 0.4,
            "train/clipped": 0.0, "train/learning_rate": 1e-3, "train/tokens": 15 * step,
            "train/tokens_per_second": 15.0, "train/memory_bytes": 2**28,
        }  # fmt: skip
        for name in ("forward", "backward") if solves else ():
            row |= {f"{name}/evaluations": 4.0, f"{name}/residual": 0.005, f"{name}/unconverged": 0.0}
        made.append(row)
        if step % 4 == 0:
            valid = {"valid/loss": 5 - 0.1 * step, "valid/perplexity": 9.0, "valid/bits_per_byte": 3.0}
            valid |= {"valid/evaluations": 4.0, "valid/residual": 0.01} if solves else {}
            made.append({"step": step, "seconds": float(step), **valid})
    return made


def write_run(
    folder: Path, config: RunConfig = CONFIG, *, steps: int = 14, summary: bool = True, twin: bool = True
) -> Path:
    """The files of a run as training leaves them, as far as a page reads them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    solves = config.model.depth is None
    write_rows(folder / "metrics.jsonl", rows(steps, solves=solves))
    if solves:
        trace = {
            "method": "anderson",
            "median": [1.0, 0.1, 0.01],
            "worst": [1.0, 0.2, 0.02],
            "evaluations": 3,
            "samples": 2,
        }
        write_rows(folder / "traces.jsonl", [{"step": step, **trace} for step in range(4, steps + 1, 4)])
    if twin:
        write_run(folder / "twin", config.for_twin(), steps=steps, summary=False, twin=False)
    if summary:
        whole = {"recipe": "text", "folder": str(folder), "xz_bits_per_byte": 3.5, "sample": True, "model": MODEL,
                 "seconds": 99.0}  # fmt: skip
        if twin:
            whole["twin"] = {**MODEL, "depth": 8, "test": {**TEST, "bits_per_byte": 2.125}}
        (folder / "summary.json").write_text(json.dumps(whole))
        (folder / "sample.txt").write_text("Once <b>upon</b> a time")
    return folder


def write_rows(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))


def page(tmp_path: Path, *paths: Path) -> tuple[Page, str]:
    write_report(paths, tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def titles(text: str) -> list[str]:
    return re.findall(r"<figcaption><strong>(.*?)</strong>", text)


def test_one_run_with_its_twin(tmp_path: Path):
    seen, text = page(tmp_path, write_run(tmp_path / "run"))
    assert "2.250 bits per byte" in seen.text
    assert "its explicit twin of 8 blocks reaches 2.125 bits per byte, xz -9 3.500 bits per byte" in seen.text
    assert titles(text) == [
        "Loss", "Bits per byte", "Cost of a solve", "Residual", "Not converged", "Gradient", "Learning rate", "Speed",
        "Memory", "run",
    ]  # fmt: skip
    assert "Once <b>upon</b> a time" in seen.text
    assert "worst sample of the last" in seen.text
    assert "max_evals" in seen.text
    assert "What went wrong" not in seen.text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_several_runs_of_other_lengths_and_texts(tmp_path: Path):
    other = dataclasses.replace(with_optim(lr=0.25), data=dataclasses.replace(CONFIG.data, vocab_size=300))
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", other, steps=9, summary=False, twin=False)]
    seen, text = page(tmp_path, *paths)
    assert "Comparison of 2 runs" in seen.text
    assert "These runs read different texts" in seen.text
    assert "unfinished, step 9 of 14" in seen.text
    assert "<b>" not in text.split("<h2>Results</h2>")[1].split("</table>")[0]  # no best of what does not compare
    runs = read_runs(paths)
    assert differences(runs) == [("data.vocab_size", ["–", "300"]), ("optim.lr", ["0.01", "0.25"])]
    heads, lines = comparison(runs)
    assert [(line.name, line.twin, line.measured) for line in lines] == [
        ("a", False, "test"), ("a, twin", True, "test"), ("b", False, "validation"),
    ]  # fmt: skip
    first = dict(zip(heads, (cell.text for cell in lines[0].cells), strict=True))
    assert (first["bits per byte"], first["parameters"], first["time"]) == ("2.250", "1,234", "1 min 15 s")


def test_the_best_is_bold_where_runs_compare(tmp_path: Path):
    runs = read_runs([write_run(tmp_path / "a")])
    heads, lines = comparison(runs)
    best = {head: [line.cells[index].best for line in lines] for index, head in enumerate(heads)}
    assert best["bits per byte"] == [False, True]
    assert best["steps"] == [False, False]


def test_an_unfinished_run_a_run_with_one_row_and_one_without(tmp_path: Path):
    for steps, said in ((6, "unfinished, step 6 of 14"), (1, "unfinished, step 1 of 14"), (0, "no metrics")):
        run = write_run(tmp_path / f"run-{steps}", steps=steps, summary=False, twin=False)
        seen, text = page(tmp_path, run)
        assert said in seen.text
        assert ("Loss" in titles(text)) is (steps > 0)
        if steps == 0:
            assert "This run holds no metrics" in seen.text


def test_a_converted_run_and_one_of_another_version(tmp_path: Path):
    for name, config in (
        ("converted", to_json(dataclasses.replace(CONFIG, recipe="convert"))),
        ("old", {"recipe": "text"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        seen, _ = page(tmp_path, tmp_path / name)
        assert "no metrics: converted, or not begun" in seen.text
        assert "nothing has been measured yet" in seen.text


def test_a_stack_shows_no_solves(tmp_path: Path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=4))
    seen, text = page(tmp_path, write_run(tmp_path / "stack", config, twin=False, summary=False))
    assert "explicit Transformer of 4 blocks" in seen.text
    assert not {"Cost of a solve", "Residual", "Not converged"} & set(titles(text))
    assert "Convergence of a solve" not in seen.text


def test_names_and_texts_are_escaped(tmp_path: Path):
    name = "<script>alert('x')</script> & \"$\\alpha$_#fa0000"
    config = with_optim(steps=14)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, sample_prompt="</style><img src=x>"))
    run = write_run(tmp_path / name.replace("/", "∕"), config)
    (run / "command.txt").write_text("equilibria train text --sample-prompt '</pre>'\n")
    write_failure(run, "the <loss> is NaN")
    seen, text = page(tmp_path, run, write_run(tmp_path / "plain"))
    assert "<script" not in text
    assert "<img" not in text
    assert "the <loss> is NaN" in seen.text


def write_failure(run: Path, reason: str) -> None:
    folder = run / "failures" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 10, "reason": reason}))


def test_failures_and_advice_are_shown(tmp_path: Path):
    solver = dataclasses.replace(CONFIG.solver, max_evals=4)
    run = write_run(tmp_path / "run", dataclasses.replace(CONFIG, solver=solver), steps=9, summary=False, twin=False)
    values = [
        {**row, "forward/unconverged": 1.0, "forward/residual": 0.3} if "train/loss" in row else row for row in rows(12)
    ]
    write_rows(run / "metrics.jsonl", [row for row in values if row["step"] <= 9])
    write_failure(run, "the loss became infinite or NaN")
    assert state(read_runs([run])[0]) == "failed at step 10 of 14"
    seen, text = page(tmp_path, run)
    assert "Step 10: not finite. the loss became infinite or NaN. Its weights" in " ".join(seen.text.split())
    assert "failures/step-00000010" in seen.text
    assert "Forward budget" in seen.text
    assert re.search(r"<code>--max-evals \d+</code>, or <code>--jacobian-weight", text)


def test_folders_that_are_none_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="there is no run folder"):
        write_report([run, tmp_path / "none"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert main(["report"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("equilibria: ") for line in lines)
    (run / "config.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_the_command_writes_beside_one_run_and_here_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run", twin=False)
    assert main(["report", "x/run"]) == 0
    assert (one / "report.html").is_file()
    assert main(["report", "x/run", "y/run", "x/run"]) == 0  # the same twice is one
    assert "x/run, y/run" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "wrote report.html" in capsys.readouterr().err
    assert [run.name for run in read_runs([one, two])] == ["x/run", "y/run"]


def test_long_lines_are_thinned_and_show_their_range():
    drawing = Drawing("title", "unit")
    values = [float(index % 2) for index in range(10 * MOST_POINTS)]
    drawing.line(range(len(values)), values, RUN[0], "line")
    line = drawing.axes.lines[0]
    assert np.asarray(line.get_ydata()).tolist() == [0.5] * MOST_POINTS
    band = drawing.axes.collections[0].get_datalim(drawing.axes.transData)
    assert (band.y0, band.y1) == (0.0, 1.0)
    assert len(drawing.svg("a")) < 120_000


def test_what_is_to_be_typed_in_a_remedy():
    assert remedy_parts("--eval-every 40, or --max-eval-steps, which reads") == [
        ("--eval-every 40", True), (", or ", False), ("--max-eval-steps", True), (", which reads", False),
    ]  # fmt: skip
    assert remedy_parts("--rtol 0.002 --backward-rtol 0.002, or --precision no")[0] == (
        "--rtol 0.002 --backward-rtol 0.002",
        True,
    )
