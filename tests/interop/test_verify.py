"""Recorded cases of the original system are reproduced, and the command that says so can say otherwise.

Every case runs in float64. In float32 all run but the four largest, which differ from the others in size alone.
"""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.interop import verify as package
from equilibria.interop.verify.__main__ import main
from equilibria.interop.verify.cases import find_cases
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.run import verify_case
from equilibria.interop.verify.tolerances import DEFAULTS, read_tolerances
from equilibria.solution import UserError

safetensors = pytest.importorskip("safetensors.torch")

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
NAMES = sorted(config.parent.name for config in GOLDEN.glob("*/config.json")) or ["none"]
LARGE = {"transformer_a_plain", "transformer_b_adaptive_tied", "trellis_a_plain", "trellis_b_wnorm"}
UNCOMPARED = {"component_broyden"}  # the released code's buffers, results that need not be its own, residuals of rounding


@pytest.mark.parametrize("name", NAMES)
def test_case_is_reproduced(shared_golden: Path, name: str) -> None:
    (case,) = find_cases(shared_golden / name)
    assert case.entry is not None
    checks = verify_case(case, ("float64",) if name in LARGE else ("float64", "float32"))
    assert checks
    assert [check.line() for check in checks if not check.passed] == []
    left = [check.note for check in checks if check.quantity == "recorded, but not compared"]
    assert bool(left) == (name in UNCOMPARED), left


def test_every_case_is_found(shared_golden: Path) -> None:
    manifest = json.loads((shared_golden / "MANIFEST.json").read_text())
    assert [case.name for case in find_cases(shared_golden)] == sorted(key.split("/")[-1] for key in manifest["cases"])


def test_the_limits_are_those_of_the_manifest(shared_golden: Path) -> None:
    """The sentences are read as they are meant; without them the same limits hold."""
    assert read_tolerances(json.loads((shared_golden / "MANIFEST.json").read_text())["tolerances"]) == DEFAULTS


def copied(golden: Path, to: Path, *names: str, manifest: bool = True) -> Path:
    """A folder of some cases, with a manifest of these alone."""
    for name in names:
        shutil.copytree(golden / name, to / name)
    if manifest:
        said = json.loads((golden / "MANIFEST.json").read_text())
        said["cases"] = {key: entry for key, entry in said["cases"].items() if key.split("/")[-1] in names}
        (to / "MANIFEST.json").write_text(json.dumps(said))
    return to


def with_manifest(folder: Path, change: Any) -> Path:
    said = json.loads((folder / "MANIFEST.json").read_text())
    change(said)
    (folder / "MANIFEST.json").write_text(json.dumps(said))
    return folder


def with_tensors(file: Path, change: Any) -> None:
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """(failed lines, last line) of what was printed."""
    printed = capsys.readouterr().out.splitlines()
    return [line for line in printed if "FAIL" in line], printed[-1]


NORM = "component_weight_norm"


@pytest.fixture
def weight_norm(shared_golden: Path, tmp_path: Path) -> Path:
    return copied(shared_golden, tmp_path, NORM)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_good_case_passes(shared_golden, tmp_path, capsys, manifest):
    folder = copied(shared_golden, tmp_path, NORM, manifest=manifest)
    assert main([str(folder)]) == 0
    failed, last = lines(capsys)
    assert not failed
    assert last.startswith("1 of 1 cases pass, 10 of 10 quantities")
    assert main([str(folder / NORM)]) == 0


def test_a_perturbed_tensor_fails(weight_norm, capsys):
    def perturb(tensors):
        tensors["conv_dim0/w"][0, 0, 0] += 1e-9

    with_tensors(weight_norm / NORM / "tensors.safetensors", perturb)
    (weight_norm / "MANIFEST.json").unlink()
    assert main([str(weight_norm)]) == 1
    (failed,), last = lines(capsys)
    assert f"{NORM}  w  (float64)" in failed
    assert "conv_dim0" in failed
    assert last.startswith("0 of 1 cases pass, 9 of 10 quantities")


def test_a_tensor_of_another_shape_or_none_fails(weight_norm, capsys):
    def perturb(tensors):
        tensors["conv_dim0/w"] = tensors["conv_dim0/w"][:-1].contiguous()
        tensors["conv_dim1/grad.v"] = tensors["conv_dim1/grad.v"] * torch.nan

    with_tensors(weight_norm / NORM / "tensors.safetensors", perturb)
    (weight_norm / "MANIFEST.json").unlink()
    assert main([str(weight_norm), "--dtype", "float64"]) == 1
    failed, _ = lines(capsys)
    assert [line.split("  ")[1] for line in failed] == ["w", "grad.v"]
    assert "recorded (6, 5, 3)" in failed[0]


def test_a_tensor_that_nothing_looks_at_is_named(weight_norm, capsys):
    with_tensors(weight_norm / NORM / "tensors.safetensors", lambda tensors: tensors.update(more=torch.zeros(1)))
    (weight_norm / "MANIFEST.json").unlink()
    main([str(weight_norm)])
    assert "recorded, but not compared" in (printed := capsys.readouterr().out)
    assert "tensors: more" in printed


def test_a_file_that_nothing_opens_is_named(weight_norm, capsys):
    safetensors.save_file({"more": torch.zeros(1)}, weight_norm / NORM / "train_more.safetensors")
    main([str(weight_norm)])
    assert "train_more: all of it" in capsys.readouterr().out


@pytest.mark.parametrize(("occurs", "quantities"), [(False, set()), (True, {"grad"})])
def test_a_gradient_that_is_not_recorded_is_zero(shared_golden, tmp_path, occurs, quantities):
    """The original records none for a cluster without a word; one that is not zero must be recorded."""
    name, variant = "component_adaptive_embedding", "div4"
    config = json.loads((shared_golden / name / "config.json").read_text())
    last = config["variants"][variant]["cutoffs"][-1]
    config["variants"] = {variant: config["variants"][variant]}

    def without_the_last_cluster(tensors):
        words = tensors[f"{variant}/ids"]
        for key in ("out", "upstream", "ids"):
            tensor = tensors[f"{variant}/{key}"]
            tensors[f"{variant}/{key}"] = tensor if occurs else tensor[words < last]
        for key in [key for key in tensors if key.startswith(f"{variant}/grad.") and ".2" in key]:
            del tensors[key]

    folder = copied(shared_golden, tmp_path, name, manifest=False)
    (folder / name / "config.json").write_text(json.dumps(config))
    with_tensors(folder / name / "tensors.safetensors", without_the_last_cluster)
    assert failures(folder) == quantities


def test_a_stricter_tolerance_fails(weight_norm, capsys):
    def stricter(said):
        said["tolerances"]["component_float32"]["all tensors"] = "relative l2 <= 1e-9 (for a test: <= 1)"

    assert main([str(with_manifest(weight_norm, stricter))]) == 1
    failed, _ = lines(capsys)
    assert failed
    assert all("(float32)" in line and "1.0e-09" in line for line in failed)
    assert main([str(weight_norm / NORM)]) == 1  # the manifest above a single case counts


@pytest.mark.parametrize("sentence", ["small", "<= 1e-9, <= 1e-3", ""])
def test_a_tolerance_that_says_nothing_is_refused(weight_norm, capsys, sentence):
    def vague(said):
        said["tolerances"]["component_float64"]["all tensors"] = sentence

    assert main([str(with_manifest(weight_norm, vague))]) == 1
    assert "component_float64: all tensors" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["tensors.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("manifest", [True, False])
def test_damaged_files_fail(weight_norm, capsys, file, damage, manifest):
    path = weight_norm / NORM / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content + b" ")
    if not manifest:
        (weight_norm / "MANIFEST.json").unlink()
    if damage == "changed" and file == "config.json" and not manifest:
        assert main([str(weight_norm)]) == 0  # nothing tells
        return
    assert main([str(weight_norm)]) == 1
    printed = capsys.readouterr()
    if manifest and damage != "missing" and (file, damage) != ("config.json", "truncated"):
        assert "the checksum of" in printed.out
    assert "missing" in printed.out + printed.err or damage != "missing" or not manifest


def test_a_listed_case_that_is_nowhere_fails(weight_norm, capsys):
    def more(said):
        said["cases"]["public/trellis_z"] = {"tolerances": ["model_float64"], "files": {}}

    assert main([str(with_manifest(weight_norm, more))]) == 1
    (failed,), _ = lines(capsys)
    assert "trellis_z" in failed
    assert "config.json is missing" in failed


def test_a_case_of_an_unknown_kind_fails(weight_norm, capsys):
    (weight_norm / NORM).rename(weight_norm / "component_weight_gnome")
    (weight_norm / "MANIFEST.json").unlink()
    assert main([str(weight_norm)]) == 1
    (failed,), _ = lines(capsys)
    assert "no case of this kind is known" in failed


def test_a_model_is_known_by_its_name_in_the_config(shared_golden, tmp_path):
    """Where the name of the case does not tell."""
    copied(shared_golden, tmp_path, "deq2021_transformer_plain", manifest=False)
    (tmp_path / "deq2021_transformer_plain").rename(tmp_path / "plain")
    (case,) = find_cases(tmp_path)
    checks = verify_case(case, ("float64",))
    assert {"nll", "train.jac_loss"} <= {check.quantity for check in checks if check.passed}


def test_tolerances_that_are_not_those_of_the_kind_fail(weight_norm, capsys):
    def others(said):
        said["cases"][f"public/{NORM}"]["tolerances"] = ["model_float64"]

    assert main([str(with_manifest(weight_norm, others))]) == 1
    (failed,), _ = lines(capsys)
    assert "the manifest names none" in failed


@pytest.mark.parametrize("options", [["--only", "trellis*"], ["--only", "component_weight"], ["--dtype", "float32"]])
def test_selection(shared_golden, tmp_path, capsys, options):
    folder = copied(shared_golden, tmp_path, NORM, "component_lr_schedule")
    assert main([str(folder), *options]) == (1 if options == ["--only", "trellis*"] else 0)
    printed = capsys.readouterr()
    if "trellis*" in options:
        assert "no case" in printed.err
    else:
        assert "component_lr_schedule" not in printed.out
        assert NORM in printed.out
    assert "float32" not in options or "(float64)" not in printed.out


def test_nothing_to_check_fails(tmp_path, shared_golden, capsys):
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "nowhere")]) == 1
    assert main([str(copied(shared_golden, tmp_path, "component_lr_schedule")), "--dtype", "float32"]) == 1
    assert capsys.readouterr().err.count("\n") == 3
    (tmp_path / "MANIFEST.json").write_text("[]")
    assert main([str(tmp_path)]) == 1


def test_json(weight_norm, tmp_path, capsys):
    assert main([str(weight_norm), "--json", str(tmp_path / "checks.json")]) == 0
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert len(checks) == 10
    assert checks[0].keys() == {"case", "quantity", "dtype", "error", "tolerance", "note", "passed"}
    assert all(check["passed"] and check["error"] <= check["tolerance"] for check in checks)


MODEL = "transformer_c_pre_lnorm"


def perturb_state(folder: Path) -> None:
    def change(tensors):
        tensors["func.dec_attn.r_w_bias"][0, 0] += 1e-6

    with_tensors(folder / "state.safetensors", change)


def perturb_gradient(folder: Path) -> None:
    def change(tensors):
        tensors["grad.func.pos_ff.ff1_net.bias"] *= 1 + 1e-6

    with_tensors(folder / "train_sub.safetensors", change)


def perturb_equilibrium(folder: Path) -> None:
    def change(tensors):
        tensors["full.zstar.2"][0, 0, 0] += 1e-6

    with_tensors(folder / "eval.safetensors", change)


def perturb_trace(folder: Path) -> None:
    said = json.loads((folder / "broyden_trace.json").read_text())
    said["backward_trace"][3] *= 1 + 1e-6
    said["forward_lowest_step"] -= 2
    (folder / "broyden_trace.json").write_text(json.dumps(said))


def perturb_key(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    said["state_dict_keys"]["func.dec_attn.r_w_bias"] = "func.dec_attn.r_r_bias"
    (folder / "config.json").write_text(json.dumps(said))


def failures(folder: Path) -> set[str]:
    (case,) = find_cases(folder)
    return {check.quantity for check in verify_case(case, ("float64",)) if not check.passed}


@pytest.mark.parametrize(
    ("perturb", "quantities"),
    [
        (perturb_state, {"full.nll", "sub.nll", "pretrain.grad of each", "train_full.mem", "forward_trace, first 10"}),
        (perturb_gradient, {"train_sub.grad of each", "train_sub.grad of all"}),
        (perturb_equilibrium, {"full.zstar"}),
        (perturb_trace, {"backward_trace, first 10", "forward_lowest_step"}),
        (perturb_key, {"error"}),
    ],
)
def test_a_perturbed_model_fails(shared_golden, tmp_path, perturb, quantities):
    folder = copied(shared_golden, tmp_path, MODEL, manifest=False) / MODEL
    perturb(folder)
    failed = failures(folder)
    assert failed >= quantities
    assert perturb is perturb_state or failed == quantities


def test_a_solve_that_does_not_get_there_fails(shared_golden, tmp_path, monkeypatch):
    def impossible(said):
        said["tolerances"]["model_float64"]["how"] = "|f(z)-z|/|z| <= 1e-19"

    monkeypatch.setattr("equilibria.interop.verify.language_models.BUDGET", 60)
    folder = with_manifest(copied(shared_golden, tmp_path, MODEL), impossible)
    failed = failures(folder)
    assert {"full.solves", "sub.solves", "train_full.solves", "train_sub.solves"} <= failed


def test_the_worst_of_a_quantity_is_kept():
    report = Report("case", "float64")
    report.add("q", 0.1, 1.0, "good")
    report.add("q", 3.0, 2.0, "bad")
    report.add("q", 50.0, 100.0, "large and good")
    assert report.checks["q"].note == "bad"
    report.add("nan", 0.1, 1.0)
    report.add("nan", float("nan"), 1.0)
    assert not report.checks["nan"].passed


def test_traces_are_compared_where_they_have_digits():
    report = Report("case", "float64")
    report.trace("same", [1.0, 0.5, 3e-7], [1.0, 0.5, 4e-7], 1e-9)
    report.trace("other", [1.0, 0.5], [1.0, 0.6], 1e-9)
    report.trace("early", [1.0, 0.5, 0.2], [1.0, 0.5, 0.1], 1e-9, first=2)
    report.trace("infinite", [1.0, float("inf")], [1.0, "inf"], 1e-9)
    report.trace("not infinite", [1.0, 2.0], [1.0, "inf"], 1e-9)
    assert {name: check.passed for name, check in report.checks.items()} == {
        "same": True, "other": False, "early": True, "infinite": True, "not infinite": False
    }  # fmt: skip


def test_find_cases_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        find_cases(tmp_path / "nowhere")


MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
