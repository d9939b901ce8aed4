"""`equilibria convert`: the run it writes evaluates as the original did; every mistake is one line and leaves nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from equilibria import Stopping
from equilibria.cli.load import load_run
from equilibria.cli.main import main
from equilibria.interop.original.checkpoint import read_checkpoint
from equilibria.interop.original.configuration import build
from equilibria.interop.original.names import original_name, translate
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerShape
from equilibria.models.language_model import EquilibriumLM
from equilibria.recipes.build import build_corpus, build_model
from equilibria.train.checkpoint import load_state, load_weights
from equilibria.train.run_folder import RunFolder

load_file = pytest.importorskip("safetensors.torch").load_file

Failure = Callable[..., str]
WORDS = 60


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine has fetched must not matter."""
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))


def options(folder: Path) -> list[str]:
    """What no tensor tells, as the recorded model had it."""
    their = json.loads((folder / "config.json").read_text())["constructor"]
    if "tgt_len" not in their:
        return ["--dilation", str(their["dilation"])]
    return [
        "--tgt-len",
        str(their["tgt_len"]),
        "--mem-len",
        str(their["mem_len"]),
        "--local-size",
        str(their["local_size"]),
    ]


def model_of(out: Path) -> EquilibriumLM:
    """The model of a run, whether it has a tokenizer or not."""
    folder = RunFolder(out)
    model = build_model(folder.load_config(), load_state(folder.best)["vocab_size"])
    load_weights(folder.best, model)
    return model.eval()


@pytest.mark.parametrize("container", ["zip", "legacy", "legacy_cuda"])
@torch.no_grad()
def test_a_converted_run_gives_the_recorded_losses(shared_golden: Path, tmp_path: Path, container: str) -> None:
    for folder in sorted(shared_golden.glob("checkpoint_*")):
        out = tmp_path / folder.name
        assert main(["convert", str(folder / f"{container}.pkl"), str(out), *options(folder)]) == 0
        expected = load_file(folder / "expected.safetensors")
        for dtype, tolerance in ((torch.float32, 5e-4), (torch.float64, 1e-8)):
            model = model_of(out).to(dtype)
            if dtype == torch.float64:
                model.deq.eval_stopping = Stopping(rtol=1e-12, atol=0.0, max_evals=250)
            memory = None
            for i in range(3):
                nll, memory, *_ = model(expected[f"data.{i}"].T, expected[f"target.{i}"].T, memory)
                assert (nll.T - expected[f"nll.{i}"]).abs().max() < tolerance, folder.name


def test_the_tensors_are_kept_bit_for_bit(shared_golden: Path, tmp_path: Path) -> None:
    for folder in sorted(shared_golden.glob("checkpoint_*")):
        out = tmp_path / folder.name
        assert main(["convert", str(folder / "legacy.pkl"), str(out)]) == 0
        state = model_of(out).state_dict()
        for name, tensor in translate(read_checkpoint(folder / "legacy.pkl")).items():
            assert state[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_what_it_says(shared_golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        main(["convert", str(shared_golden / "checkpoint_transformer_g_wnorm/zip.pkl"), str(out), "--mem-len", "16"]) == 0
    )
    said = capsys.readouterr().out
    assert "DEQ-Transformer of 2019, 18,206 parameters" in said
    assert (
        "d_model 32, n_head 4, d_head 8, d_inner 64, n_token 200, d_embed 32, cutoffs 60 150, div_val 4, wnorm True" in said
    )
    assert "local_size 0, pre_lnorm False, dropout 0.0, subseq_len 0, tgt_len 150" in said
    assert "mem_len" not in said  # it was given
    assert "wikitext-103 (assumed; --corpus says otherwise)" in said
    assert f"next: equilibria eval {out} --data-dir FOLDER" in said


# A checkpoint of our own making, with a text to read


def transformer(**changes: object) -> dict[str, Tensor]:
    """A state dict as the original writes it, repeated tensors included."""
    torch.manual_seed(0)
    shape = TransformerShape(**{"d_model": 16, "n_head": 2, "d_inner": 24, "init_std": 0.3, **changes})  # type: ignore[arg-type]
    state = {original_name(name, "transformer"): t for name, t in build(shape, WORDS).state_dict().items()}
    kernels = {name: t[..., None] for name, t in state.items() if "_net.weight" in name or name == "inject_conv.weight"}
    state |= kernels
    copies = {f"deq.{name}": tensor for name, tensor in state.items() if name.startswith("func.")}
    return state | copies | {"pos_emb.inv_freq": 10000.0 ** -(torch.arange(0, 16, 2) / 16)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "pretrained.pkl"
    torch.save(transformer(), path)
    return path


@pytest.fixture(scope="module")
def treebank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with as many words as the model knows, the end of the line included."""
    folder = tmp_path_factory.mktemp("treebank")
    draw = random.Random(0)
    words = [f"w{i}" for i in range(WORDS - 1)]
    for name, lines in (("train", 40), ("valid", 8), ("test", 8)):
        first = [" ".join(words)] if name == "train" else []
        text = [*first, *(" ".join(draw.choices(words, k=9)) for _ in range(lines))]
        (folder / f"ptb.{name}.txt").write_text("".join(f" {line} \n" for line in text), encoding="utf-8")
    return folder


def test_evaluate_and_generate(
    original: Path, treebank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_text, without = tmp_path / "with", tmp_path / "without"
    argv = ["--corpus", "penn-treebank", "--tgt-len", "12", "--mem-len", "12"]
    assert main(["convert", str(original), str(with_text), *argv, "--data-dir", str(treebank)]) == 0
    assert f"next: equilibria eval {with_text}\n" in capsys.readouterr().out
    assert main(["convert", str(original), str(without), *argv]) == 0
    capsys.readouterr()
    assert main(["eval", str(with_text)]) == 0
    first = capsys.readouterr().out
    read: list[object] = []
    monkeypatch.setattr("equilibria.cli.load.build_corpus", lambda data: read.append(data) or build_corpus(data))
    assert main(["eval", str(without), "--data-dir", str(treebank)]) == 0
    assert len(read) == 1, "once for the tokenizer and the text"
    second = capsys.readouterr().out
    perplexity = [next(line for line in text.splitlines() if "perplexity" in line) for text in (first, second)]
    assert perplexity[0] == perplexity[1]
    assert main(["generate", str(with_text), "--prompt", "w1 w2", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("w1 w2 ")
    assert isinstance(load_run(with_text).model(), DEQTransformerLM)


def test_a_run_without_a_tokenizer_says_so(original: Path, tmp_path: Path, text_dir: Path, failure: Failure) -> None:
    out = tmp_path / "run"
    assert main(["convert", str(original), str(out)]) == 0
    assert "has no tokenizer" in failure("generate", out, "--prompt", "w1")
    failure("eval", out, "--data-dir", text_dir)


def test_another_vocabulary(original: Path, tmp_path: Path, treebank: Path, failure: Failure) -> None:
    other = shutil.copytree(treebank, tmp_path / "other")
    with (other / "ptb.train.txt").open("a", encoding="utf-8") as file:
        file.write(" another word \n")
    out = tmp_path / "run"
    said = failure("convert", original, out, "--corpus", "penn-treebank", "--data-dir", other)
    assert f"penn-treebank in {other} has a vocabulary of 62, but the tensors have n_token 60" in said
    assert not out.exists()
    assert main(["convert", str(original), str(out), "--corpus", "penn-treebank", "--tgt-len", "12"]) == 0
    assert "62" in failure("eval", out, "--data-dir", other)


def nothing_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.rglob("*") if "run" in path.name]


def test_an_existing_folder_is_refused(original: Path, tmp_path: Path, failure: Failure) -> None:
    out = tmp_path / "run"
    out.mkdir()
    assert "exists already" in failure("convert", original, out)
    out.rmdir()
    out.write_text("mine")
    assert "exists already" in failure("convert", original, out)
    assert out.read_text() == "mine"
    out.unlink()
    out.symlink_to(tmp_path / "nowhere")
    assert "exists already" in failure("convert", original, out)


def test_wrong_command_lines(original: Path, tmp_path: Path, failure: Failure) -> None:
    out = tmp_path / "run"
    assert "missing: ORIGINAL, OUT" in failure("convert")
    assert "there is no file" in failure("convert", tmp_path / "none.pkl", out)
    assert "is a folder" in failure("convert", tmp_path, out)
    for argv, said in (
        ("--n-head 4", "--n-head is 4, but the tensors say 2"),
        ("--nhid 4", "--nhid is an option of a DEQ-TrellisNet"),
        ("--cutoffs 5 9", "--cutoffs is 5 9, but crit.cluster_weight has 0 clusters"),
        ("--dropout 2", "--dropout is 2.0; give a share"),
        ("--tgt-len 0", "--tgt-len is 0"),
        ("--corpus bible", "invalid choice 'bible'"),
        ("--mem 3", "--mem"),
    ):
        assert said in failure("convert", original, out, *argv.split())
        assert nothing_left(tmp_path)


def test_damaged_state_dicts(tmp_path: Path, failure: Failure) -> None:
    """Every tensor missing, of another shape, or different from its repetition; and one too many."""
    whole = transformer()
    path, out = tmp_path / "original.pkl", tmp_path / "run"
    states = [{}, whole | {"more": torch.ones(1)}, {"conv1.weight": torch.ones(2, 2)}]
    for name, tensor in whole.items():
        if name == "pos_emb.inv_freq":
            continue
        repeated = name.startswith(("func.", "deq.func."))
        if not repeated:
            states.append({other: t for other, t in whole.items() if other != name})
        states += [whole | {name: torch.cat((tensor, tensor))}, whole | {name: tensor[None]}]
        if repeated:
            states.append(whole | {name: tensor + 1})
    for state in states:
        torch.save(state, path)
        failure("convert", path, out)
        assert nothing_left(tmp_path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_damaged_files(tmp_path: Path, new: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut short it is refused; with flipped bytes too, unless they are in numbers without a checksum."""
    path, out = tmp_path / "original.pkl", tmp_path / "run"
    torch.save(transformer(), path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    draw = random.Random(0)
    damaged = [whole[: draw.randrange(len(whole))] for _ in range(20)]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        capsys.readouterr()
        code = main(["convert", str(path), str(out)])
        error = capsys.readouterr().err
        if code == 0:
            assert len(content) == len(whole)
            shutil.rmtree(out)
        else:
            refused += 1
            assert code == 2
            assert error.startswith("equilibria: ")
            assert error.count("\n") == 1
        assert nothing_left(tmp_path)
    assert refused >= 20


def test_a_disk_that_fails_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("equilibria.cli.convert.save_checkpoint", full)
    assert "No space left" in failure("convert", original, tmp_path / "run")
    assert nothing_left(tmp_path)


def test_numbers_of_float64_are_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "original.pkl", tmp_path / "run"
    torch.save({name: tensor.double() for name, tensor in transformer().items()}, path)
    assert main(["convert", str(path), str(out)]) == 0
    assert "rounded    from float64 to float32" in capsys.readouterr().out
