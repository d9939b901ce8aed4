"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from equilibria.data import Corpus, OrderedBatches
from equilibria.models.block import Memory
from equilibria.regularizers import JacobianSchedule
from equilibria.solution import NonFiniteError, UserError
from equilibria.train import checkpoint
from equilibria.train.config import RunConfig, to_json
from equilibria.train.evaluate import Evaluation, evaluate
from equilibria.train.interrupt import Interrupted, StopRequest
from equilibria.train.memory import PeakMemory
from equilibria.train.progress import Progress
from equilibria.train.run_folder import MetricsLog, RunFolder
from equilibria.train.schedule import make_optimizer, make_schedule
from equilibria.train.state import TrainState
from equilibria.train.window import Window


class Trainer:
    """Trains a language model on a corpus and keeps a run folder up to date.

    `model(tokens, targets, memory, depth=..., jacobian=...)` returns an output with `nll` (B, L), `memory`, `stats` and
    `jacobian`, as `equilibria.models.DEQTransformerLM` does. `last_step` stops before the schedule ends, so that a twin
    can be trained for as long as another run was.

    The text is read in order, B lanes side by side and L tokens at a time; the memory that one segment leaves is
    passed to the next, and begins empty at each epoch. A checkpoint is written at every validation, at the end, and
    when `stop` is requested; a run resumed from it takes the very steps that it would have taken uninterrupted.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        config: RunConfig,
        folder: RunFolder,
        *,
        stop: StopRequest,
        last_step: int | None = None,
        label: str = "train",
    ) -> None:
        self.corpus, self.config, self.folder, self.stop, self.label = corpus, config, folder, stop, label
        self.last_step = config.optim.steps if last_step is None else last_step
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.optim.accumulate,
            step_scheduler_with_optimizer=False,
            log_with="tensorboard",
            project_dir=folder.path,
        )
        if self.accelerator.num_processes > 1:
            raise UserError("training runs in one process so far; start it without `accelerate launch` or `torchrun`")
        optimizer = make_optimizer(model, config.optim)
        self.plain_optimizer = optimizer
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.batches = OrderedBatches(
            corpus.train.tokens, config.optim.batch_size, config.optim.length, self.accelerator.device
        )
        self.jacobian_weight = JacobianSchedule(
            weight=config.solver.jacobian_weight,
            share=config.solver.jacobian_share if config.solver.jacobian_weight else 0.0,
            increment=config.solver.jacobian_increment,
            every=config.solver.jacobian_every,
            seed=config.seed,
        )
        self.state = TrainState()
        self.memory: Memory | None = None
        self.saved_step: int | None = None
        self.window = Window()
        self.metrics: MetricsLog | None = None
        if folder.has_checkpoint():
            self._restore()
        self.schedule = make_schedule(optimizer, config.optim, step=self.state.step)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the last step, the end of the wall-clock budget, or ctrl-C (which raises Interrupted)."""
        state = self.state
        with contextlib.ExitStack() as stack:  # whatever was opened is closed, wherever ctrl-C strikes
            stack.callback(setattr, self, "metrics", None)
            self.metrics = stack.enter_context(contextlib.closing(MetricsLog(self.folder.metrics, step=state.step)))
            purge = {"purge_step": state.step + 1} if state.step else {}
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
            stack.callback(self.accelerator.end_training)
            progress = Progress(self.label, steps=self.last_step, done=state.step)
            stack.callback(progress.close)
            self.model.train()
            try:
                self._loop(progress)
            except Interrupted:
                self.save()
                raise
            except NonFiniteError as error:
                raise NonFiniteError(self._explain(error), error.solution) from error

    def _loop(self, progress: Progress) -> None:
        state, config = self.state, self.config
        peak = PeakMemory(self.accelerator.device)
        earlier_seconds, earlier_peak, started = state.seconds, state.peak_memory, time.perf_counter()
        while True:
            done = state.step >= self.last_step or self._out_of_time()
            # A validation that ctrl-C cuts short is not marked as done, so a resumed run begins with it.
            if state.step > state.validated and (done or state.step % config.eval_every == 0):
                self._validate(progress, depth=None if done else self._depth())
                self.save()
            if done:
                return
            self.stop.check()
            self._step()
            state.seconds = earlier_seconds + time.perf_counter() - started
            state.peak_memory = max(earlier_peak, peak.read())
            progress.step(self.window.status())
            if state.step % config.log_every == 0:
                self._record_window()

    def _step(self) -> None:
        """One optimizer step, on `accumulate` consecutive segments."""
        started = time.perf_counter()
        depth, weight = self._depth(), self.jacobian_weight(self.state.step)
        for _ in range(self.config.optim.accumulate):
            tokens, targets = self._next_segment()  # (B, L) each
            with self.accelerator.accumulate(self.model):
                output = self.model(tokens, targets, self.memory, depth=depth, jacobian=weight > 0)
                loss = output.nll.mean()
                value = _finite(loss, "the loss")
                if output.jacobian is not None:
                    loss = loss + weight * output.jacobian
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
                    _finite(norm, "the gradient")
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.memory = output.memory
            self.state.tokens += targets.numel()
            self.window.add(value, targets, output)
        self.schedule.step()
        self.state.step += 1
        seconds = time.perf_counter() - started
        self.window.seconds += seconds
        self.state.train_seconds += seconds

    def _next_segment(self) -> tuple[Tensor, Tensor]:
        state = self.state
        if state.segment == len(self.batches):
            state.epoch, state.segment, self.memory = state.epoch + 1, 0, None
        segment = self.batches[state.segment]
        state.segment += 1
        return segment

    def _depth(self) -> int | None:
        """Blocks of the explicit stack during the warm-up phase; None afterwards."""
        optim = self.config.optim
        return optim.pretrain_depth if self.state.step < optim.pretrain_steps else None

    def _out_of_time(self) -> bool:
        minutes = self.config.optim.minutes
        return minutes is not None and self.state.seconds >= 60 * minutes

    def _validate(self, progress: Progress, depth: int | None) -> None:
        """Evaluate on the validation split and keep the weights if they are the best so far."""
        self._record_window()
        state = self.state
        result = self.evaluate("valid", depth=depth)
        state.validated = state.step
        row = {
            "valid/loss": result.nll,
            "valid/perplexity": result.perplexity,
            "valid/bits_per_byte": result.bits_per_byte,
            "valid/evaluations": result.evaluations,
            "valid/residual": result.residual,
        }
        self._record(row)
        _finite(result.nll, "the validation loss")
        warming_up = depth is not None  # a good stack need not be a good equilibrium
        if not warming_up and (state.best_nll is None or result.nll < state.best_nll):
            state.best_nll, state.best_step = result.nll, state.step
            checkpoint.save_checkpoint(
                self.folder.best, {"step": state.step, "config": to_json(self.config)}, self._plain_model()
            )
        progress.note(
            f"step {state.step}/{self.last_step}  validation: {result.bits_per_byte:.3f} bits per byte, "
            f"perplexity {result.perplexity:.1f}"
        )

    def evaluate(self, split: str, *, depth: int | None = None) -> Evaluation:
        """Evaluate the present weights on a split of the corpus, by name; `depth` as in `evaluate.evaluate`."""
        config = self.config
        return evaluate(
            self.model,
            getattr(self.corpus, split),
            batch_size=config.eval_batch_size,
            length=config.optim.length,
            device=self.accelerator.device,
            depth=depth,
            on_segment=self.stop.check,
        )

    # -- what is shown and stored --------------------------------------------------------------------------------

    def _record_window(self) -> None:
        """Write the row of the steps since the last one."""
        if self.window.losses:
            rate = self.schedule.get_last_lr()[0]
            self._record({**self.window.row(), "train/learning_rate": rate, "train/tokens": self.state.tokens})
            self.window.clear()

    def _record(self, row: dict[str, Any]) -> None:
        row = {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
        if self.metrics is not None:
            self.metrics.append({"step": self.state.step, "seconds": round(self.state.seconds, 3), **row})
            self.accelerator.log(row, step=self.state.step)

    def _explain(self, error: NonFiniteError) -> str:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".;")  # the rest is for users of the library
        kept = (
            f"the last checkpoint is that of step {self.saved_step} in {self.folder.checkpoint}, resume with a smaller"
            if self.saved_step is not None
            else "nothing was saved yet, start again with a smaller"
        )
        return f"step {self.state.step + 1}: {reason}; {kept} --lr, a smaller --clip or a larger --warmup-steps"

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this step, and the metrics up to it."""
        self._record_window()
        position = checkpoint.random_state()
        if self.memory is not None:
            position |= {f"memory/{name}": tensor for name, tensor in self.memory._asdict().items()}
        state = {
            **dataclasses.asdict(self.state),
            "corpus_sha256": _fingerprint(self.corpus.train.tokens),
            "config": to_json(self.config),
        }
        checkpoint.save_checkpoint(self.folder.checkpoint, state, self._plain_model(), self.plain_optimizer, position)
        self.saved_step = self.state.step

    def _restore(self) -> None:
        folder = self.folder.checkpoint
        stored = checkpoint.load_state(folder)
        try:
            self.state = TrainState.from_json(stored)
            fingerprint = stored["corpus_sha256"]
        except KeyError as error:
            raise UserError(f"{folder} was written by another version: it lacks {error}; start a new run") from error
        if fingerprint != _fingerprint(self.corpus.train.tokens):
            raise UserError(f"the training text is not the one that {folder} was trained on; give the same --data-dir")
        checkpoint.load_weights(folder, self._plain_model())
        checkpoint.load_optimizer(folder, self._plain_model(), self.plain_optimizer)
        position = checkpoint.load_position(folder)
        checkpoint.set_random_state(position)
        memory = {
            name.removeprefix("memory/"): tensor.to(self.accelerator.device)
            for name, tensor in position.items()
            if name.startswith("memory/")
        }
        self.memory = Memory(**memory) if memory else None
        self.saved_step = self.state.step

    def _plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


def _finite(value: Tensor | float | None, what: str) -> float:
    """The value as a number; NonFiniteError if it is none."""
    number = value.item() if isinstance(value, Tensor) else value or 0.0
    if not math.isfinite(number):
        raise NonFiniteError(f"{what} became infinite or NaN")
    return number


def _fingerprint(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
