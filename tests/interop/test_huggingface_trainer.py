"""`Trainer` on our models: it learns, and a resumed run is the run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import make, text
from transformers import Trainer, TrainingArguments, set_seed

ROWS = [{"input_ids": row.tolist()[:length]} for row, length in zip(text(8, 9), (9, 8, 7, 9, 6, 5, 9, 8), strict=True)]


def collate(rows: list[dict[str, Any]], *, left: bool = True) -> dict[str, torch.Tensor]:
    """Texts that end together, as `generate` wants them, or that begin together."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        place = slice(longest - length, None) if left else slice(length)
        ids[i, place], mask[i, place] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(family: str, folder: Path, steps: int = 4) -> Trainer:
    set_seed(0)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=4, seed=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    options: dict[str, Any] = {"dropout": 0.1} if family == "transformer" else {"hidden_dropout": 0.1}
    model = make(family, **options, rtol=1e-3, max_evals=20, jacobian_weight=0.1).float()
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collate)  # pyright: ignore


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_a_resumed_run_is_the_run(family: str, tmp_path: Path) -> None:
    whole = trainer(family, tmp_path)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = [row["eval_loss"] for row in whole.state.log_history if "eval_loss" in row][-1]
    assert after < before
    assert not list(tmp_path.rglob("pytorch_model*"))
    resumed = trainer(family, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row][-2:] for each in (whole, resumed)]
    assert losses[0] == losses[1]
    models: list[Any] = [whole.model, resumed.model]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_accumulated_batches_weigh_their_labels_alike(tmp_path: Path) -> None:
    """Four texts at once, or in two batches of unequal length, give one loss."""
    losses = []
    for batch, accumulated in ((4, 1), (2, 2)):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        )  # fmt: skip
        run = Trainer(make(), arguments, train_dataset=ROWS[2:6], data_collator=partial(collate, left=False))  # pyright: ignore
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
