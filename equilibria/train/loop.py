"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

from equilibria.solution import NonFiniteError, Stats
from equilibria.train import checkpoint
from equilibria.train.config import to_json
from equilibria.train.evaluate import Evaluation, evaluate
from equilibria.train.interrupt import Interrupted
from equilibria.train.memory import PeakMemory
from equilibria.train.progress import Progress
from equilibria.train.run import Run
from equilibria.train.shown import shown_perplexity
from equilibria.train.solves import step_budget, trace_stopping
from equilibria.train.step import require_finite
from equilibria.train.traces import trace_solve
from equilibria.train.whole import whole_weights


class Trainer(Run):
    """Trains a language model on a corpus and keeps a run folder up to date.

    `model(tokens, targets, memory, depth=..., jacobian=...)` returns an output with `nll` (B, L), `memory`, `stats` and
    `jacobian`, as the models of `equilibria.models` do. `last_step` stops before the schedule ends, so that a twin can be
    trained for as long as another run was.

    A text is read in order, B lanes side by side and L tokens at a time; the memory that one segment leaves is passed to
    the next, and begins empty at each epoch. Independent sequences are read in another order each epoch, without memory.
    A checkpoint is written at every validation, every `checkpoint_every` steps besides, at the end, and when `stop` is
    requested; a run resumed from it takes the very steps that it would have taken uninterrupted.
    """

    def run(self) -> None:
        """Train until the last step, the end of the wall-clock budget, or ctrl-C (which raises Interrupted)."""
        # Whatever was opened is closed, wherever ctrl-C strikes.
        with self._full_disk_explained(), contextlib.ExitStack() as stack:
            progress = Progress(self.label, steps=self.last_step, done=self.state.step, shown=self.ranks.is_main)
            stack.callback(progress.close)
            stack.callback(self.recorder.close)
            self.recorder.open(progress.note)
            if self.state.step:
                progress.note(f"going on from step {self.state.step}/{self.last_step}")
            self.model.train()
            if self.config.on_nonfinite == "roll-back" and self.saved_step is None:
                self.save()  # so that there is something to go back to
            while True:
                try:
                    return self._loop(progress)
                except Interrupted:
                    self.save()
                    raise
                except NonFiniteError as error:
                    self._keep_failure(error, progress)
                    if self.config.on_nonfinite == "stop" or self.state.rollbacks >= self.config.max_rollbacks:
                        raise NonFiniteError(self._explain(error), error.solution) from error
                    self._roll_back(error, progress)

    def _loop(self, progress: Progress) -> None:
        state, config = self.state, self.config
        peak = PeakMemory(self.accelerator.device)
        earlier_seconds, earlier_peak, started = state.seconds, state.peak_memory, time.perf_counter()
        self._clock = lambda: earlier_seconds + time.perf_counter() - started
        while True:
            done = state.step >= self.last_step or self._out_of_time()
            # A validation that ctrl-C cuts short is not marked as done, so a resumed run begins with it.
            if state.step > state.validated and (done or self._validation_due()):
                self._validate(progress, depth=None if done else self._eval_depth())
                self.save()
            if done:
                return
            if self._checkpoint_due():
                self.save()
            self.stop_together.check_agreed()
            self.watch.begin(state, None if self.reader.at_end else self.reader.memory)
            self._step()
            self.watch.end()
            state.peak_memory = max(earlier_peak, peak.read())
            progress.step(self.recorder.window.status())
            if state.step % config.log_every == 0:
                self.recorder.record_window(self.rate.rate)

    def _step(self) -> None:
        """One optimizer step, on `accumulate` consecutive segments."""
        started = time.perf_counter()
        state, config = self.state, self.config
        depth, weight = self._depth(), self.jacobian_weight(state.step)
        if config.solver.max_evals_delta:
            deq: Any = self._plain_model().deq
            deq.stopping = dataclasses.replace(deq.stopping, max_evals=step_budget(config.solver, config.seed, state.step))
        count = config.optim.accumulate
        for index in range(count):
            self._backward(depth, weight, of=count, last=index == count - 1)
        agreed = self.gradient.agree(config.optim.clip, stop=self.stop.requested, seconds=self._clock())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stop_together.agreed, state.seconds = agreed.stop, agreed.seconds
        state.step += 1
        self.rate.cuts.epochs_over(self.reader.epochs, config.optim)
        self.rate.set(state.step)
        taken = time.perf_counter() - started
        self.recorder.window.step(gradient_norm=agreed.norm, clip=config.optim.clip, seconds=taken)
        state.train_seconds += taken

    def _backward(self, depth: int | None, weight: float, *, of: int, last: bool) -> None:
        """Add the gradient of the next segment, in `batch_chunk` parts."""
        rows = self.reader.next()
        parts = list(self.reader.parts(rows, self.config.optim.batch_chunk))
        segment = self.gradient.add(parts, depth=depth, jacobian=weight, of=of, last=last)
        self.reader.remember(segment.memories)
        self.recorder.window.add(segment.loss, round(rows.share * rows.size), segment.solves)
        self.state.tokens += rows.size

    def _eval_depth(self) -> int | None:
        """Blocks of the stack in a validation: `_depth`, unless the recipe has another for it."""
        depth, own = self._depth(), self.config.optim.eval_depth
        return depth if depth is None or own is None else own

    def _validation_due(self) -> bool:
        every = self.config.eval_every
        if every is None:
            return self.reader.ended_in_last(self.config.optim.accumulate)
        return self.state.step % every == 0

    def _checkpoint_due(self) -> bool:
        step, every = self.state.step, self.config.checkpoint_every
        return every is not None and step > 0 and step % every == 0 and step != self.saved_step

    def _out_of_time(self) -> bool:
        minutes = self.config.optim.minutes
        return minutes is not None and self.state.seconds >= 60 * minutes

    # -- validation ----------------------------------------------------------------------------------------------

    def _validate(self, progress: Progress, depth: int | None) -> None:
        """Evaluate on the validation split, let it set the learning rate, and keep the weights if they are the best."""
        self.recorder.record_window(self.rate.rate)
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
        self.recorder.record(row)
        if depth is None and self.config.model.depth is None:
            self.recorder.record_trace(self._trace())
        require_finite(result.nll, "the validation loss")
        self.rate.cuts.validated(result.nll, state.step, self.config.optim)
        self.rate.set(state.step)
        warming_up = depth is not None  # a good stack need not be a good equilibrium
        if not warming_up and (state.best_nll is None or result.nll < state.best_nll):
            state.best_nll, state.best_step = result.nll, state.step
            about = {"step": state.step, "config": to_json(self.config)}
            weights = whole_weights(self._plain_model(), self.ranks)
            if self.ranks.is_main:
                checkpoint.save_checkpoint(self.folder.best, about, model=weights)
        coded = f"loss {result.nll:.3g}, "
        if result.bits_per_byte is not None:
            coded = f"{result.bits_per_byte:.3f} bits per byte, "
        shown = shown_perplexity(result.perplexity)
        progress.note(f"step {state.step}/{self.last_step}  validation: {coded}perplexity {shown}")

    def evaluate(self, split: str, *, depth: int | None = None) -> Evaluation:
        """Evaluate the present weights on a split of the corpus, by name; `depth` as in `evaluate.evaluate`."""
        config = self.config
        return evaluate(
            self.model,
            getattr(self.corpus, split),
            batch_size=config.eval_batch_size,
            length=config.eval_segment,
            device=self.accelerator.device,
            depth=depth,
            max_steps=config.max_eval_steps,
            on_segment=self.stop_together.check,
            ranks=self.ranks,
        )

    def _trace(self) -> Stats:
        """A whole solve on validation text, to see later how solves changed."""
        return trace_solve(
            self.model,
            self.corpus.valid,
            trace_stopping(self.config.solver),
            batch_size=self.config.eval_batch_size,
            length=self.config.eval_segment,
            device=self.accelerator.device,
            plain=self._plain_model(),
        )
