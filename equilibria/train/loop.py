"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from equilibria.data import Corpus
from equilibria.data.disk import is_full
from equilibria.solution import NonFiniteError, Stats, UserError
from equilibria.train import checkpoint
from equilibria.train.checks import check
from equilibria.train.config import RunConfig, to_json
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.evaluate import Evaluation, evaluate
from equilibria.train.failure import StepWatch, finite, reason, save_failure
from equilibria.train.interrupt import Interrupted, StopRequest, StopTogether
from equilibria.train.memory import PeakMemory
from equilibria.train.parallel import make_accelerator, prepare
from equilibria.train.progress import Progress
from equilibria.train.reading import Reader
from equilibria.train.recorder import Recorder
from equilibria.train.resume import restore_run, save_run
from equilibria.train.run_folder import RunFolder
from equilibria.train.schedule import LearningRate
from equilibria.train.solves import jacobian_schedule, step_budget, trace_stopping
from equilibria.train.state import TrainState
from equilibria.train.step import Gradient
from equilibria.train.traces import trace_solve
from equilibria.train.whole import whole_weights


class Trainer:
    """Trains a language model on a corpus and keeps a run folder up to date.

    `model(tokens, targets, memory, depth=..., jacobian=...)` returns an output with `nll` (B, L), `memory`, `stats` and
    `jacobian`, as the models of `equilibria.models` do. `last_step` stops before the schedule ends, so that a twin can be
    trained for as long as another run was.

    A text is read in order, B lanes side by side and L tokens at a time; the memory that one segment leaves is passed to
    the next, and begins empty at each epoch. Independent sequences are read in another order each epoch, without memory.
    A checkpoint is written at every validation, every `checkpoint_every` steps besides, at the end, and when `stop` is
    requested; a run resumed from it takes the very steps that it would have taken uninterrupted.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.corpus, self.config, self.folder, self.stop, self.label = corpus, config, folder, stop, label
        self.ranks, self.stop_together = ranks, StopTogether(stop, ranks)
        optim = config.optim
        self.last_step = optim.steps if last_step is None else last_step
        equal = f"{ranks.count} processes cannot share it equally; give a multiple of {ranks.count}"
        check(optim.batch_size % ranks.count == 0, "batch_size", optim.batch_size, equal)
        self.accelerator = make_accelerator(config, ranks)
        self.model, self.optimizer = prepare(self.accelerator, model, optim)
        self.gradient = Gradient(self.model, self.accelerator, ranks)
        if ranks.rank > 0:  # the first goes on from the seed as one process would; what follows is dropout alone
            torch.manual_seed(hash((config.seed, ranks.rank)) % 2**63)
        self.state = TrainState()
        self.rate = LearningRate(self.optimizer, optim)
        self.jacobian_weight = jacobian_schedule(config.solver, config.optim.pretrain_steps, config.seed)
        self.saved_step: int | None = None
        memory = self._restore() if ranks.from_main(folder.has_checkpoint) else None
        device = self.accelerator.device
        batches = corpus.train.batches(
            optim.batch_size, optim.length, device, seed=config.seed, variable_length=optim.variable_length
        )
        self.reader = Reader(batches, self.state, ranks)
        self.reader.memory = memory
        self.recorder = Recorder(folder, config, self.state, ranks)
        self.rate.set(self.state.step)
        self.watch = StepWatch(self._plain_model())
        self._clock: Callable[[], float] = lambda: self.state.seconds  # time of the run so far

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the last step, the end of the wall-clock budget, or ctrl-C (which raises Interrupted)."""
        # Whatever was opened is closed, wherever ctrl-C strikes.
        with self._full_disk_explained(), contextlib.ExitStack() as stack:
            progress = Progress(self.label, steps=self.last_step, done=self.state.step, shown=self.ranks.is_main)
            stack.callback(progress.close)
            stack.callback(self.recorder.close)
            self.recorder.open(progress.note)
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

    def _depth(self) -> int | None:
        """Blocks of the explicit stack during the warm-up phase; None afterwards."""
        optim = self.config.optim
        return optim.pretrain_depth if self.state.step < optim.pretrain_steps else None

    def _eval_depth(self) -> int | None:
        """The same for a validation."""
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
        _finite(result.nll, "the validation loss")
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
        progress.note(f"step {state.step}/{self.last_step}  validation: {coded}perplexity {result.perplexity:.1f}")

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

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this step, and the metrics up to it; NonFiniteError if there is no going on from it."""
        if self.ranks.any(not finite(self.model.parameters())):
            raise NonFiniteError("the weights became infinite or NaN")
        self.recorder.record_window(self.rate.rate)
        self.recorder.sync()
        save_run(
            self.folder.checkpoints,
            self.config,
            self._plain_model(),
            self.optimizer,
            state=self.state,
            cuts=self.rate.cuts,
            memory=self.reader.memory,
            fingerprint=self.corpus.fingerprint,
            ranks=self.ranks,
        )
        self.saved_step = self.state.step

    def _restore(self) -> Any:
        """Go on where the newest checkpoint without damage is, and return the memory there."""
        resumed = restore_run(
            self.folder.checkpoints,
            self._plain_model(),
            self.optimizer,
            fingerprint=self.corpus.fingerprint,
            device=self.accelerator.device,
            ranks=self.ranks,
        )
        self.state, self.rate.cuts, self.saved_step = resumed.state, resumed.cuts, resumed.state.step
        return resumed.memory

    def _plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    # -- failures ------------------------------------------------------------------------------------------------

    def _keep_failure(self, error: NonFiniteError, progress: Progress) -> None:
        """Write what there is to know of the step or validation that failed."""
        began, model = self.watch.began, self._plain_model()
        deq: Any = model.deq
        step = self.state.step + (began is not None)
        self.recorder.record_window(self.rate.rate)
        try:
            save_failure(
                self.folder.failure(step),
                self.watch,
                model,
                batches=[] if began is None else self.reader.read_since(began),
                ranks=self.ranks,
                config=self.config,
                metrics=self.folder.metrics,
                error=error,
                checkpoint=self.saved_step,
                step=step,
                in_validation=began is None,
                vocab_size=self.corpus.tokenizer.size,
                learning_rate=self.rate.rate,
                depth=self._depth(),
                jacobian_weight=self.jacobian_weight(self.state.step),
                max_evals=deq.stopping.max_evals,
            )
        except OSError as full:
            if not is_full(full):
                raise
            progress.note(f"the disk is full: {self.folder.failure(step)} could not be written")

    def _roll_back(self, error: NonFiniteError, progress: Progress) -> None:
        """Go back to the last checkpoint, but on with the text after what was read, where the memory is empty at first."""
        left = self.state
        self.recorder.close()
        self.optimizer.zero_grad()
        self._restore()
        self.state.rollbacks = left.rollbacks + 1
        self.state.epoch, self.state.segment = left.epoch, left.segment
        self.state.seconds, self.state.peak_memory = left.seconds, left.peak_memory
        self.reader.state, self.reader.memory = self.state, None
        self.recorder.state = self.state
        self.recorder.window.clear()
        self.recorder.open(progress.note)
        self.rate.set(self.state.step)
        progress.back_to(self.state.step)
        failed = left.step + (self.watch.began is not None)
        progress.note(
            f"step {failed}: {reason(error)}; back to the checkpoint of step {self.state.step} "
            f"(roll-back {self.state.rollbacks} of {self.config.max_rollbacks}), and on with the text after that batch, "
            f"with an empty memory; see {self.folder.failure(failed)}"
        )
        self.watch.end()

    def _explain(self, error: NonFiniteError) -> str:
        step = self.state.step + (self.watch.began is not None)
        after = f" after {self.state.rollbacks} roll-backs" if self.state.rollbacks else ""
        return (
            f"step {step}: {reason(error)}{after}; {self._kept()} with a smaller --lr, a smaller --clip or a larger "
            f"--warmup-steps; the batch is in {self.folder.failure(step)}"
        )

    @contextlib.contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            where = "" if error.filename is None else f" of {error.filename}"
            reason = f"step {self.state.step}: no room on the disk{where} ({error.strerror}); free some space"
            raise UserError(f"{reason}; {self._kept()} by adding --resume") from error

    def _kept(self) -> str:
        if self.saved_step is None:
            return "nothing was saved yet, start again"
        return f"the last checkpoint is that of step {self.saved_step} in {self.folder.path}, resume"


def _finite(number: float, what: str) -> float:
    """The number; NonFiniteError if it is none."""
    if not math.isfinite(number):
        raise NonFiniteError(f"{what} became infinite or NaN")
    return number
