"""The parts of a run in training, and how they are saved, brought back, and taken back where a loss is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equilibria.data import Corpus
from equilibria.data.disk import is_full
from equilibria.solution import NonFiniteError, UserError
from equilibria.train.checks import check
from equilibria.train.config import RunConfig
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.failure import StepWatch, finite, reason, save_failure
from equilibria.train.interrupt import StopRequest, StopTogether
from equilibria.train.parallel import make_accelerator, prepare
from equilibria.train.progress import Progress
from equilibria.train.reading import Reader
from equilibria.train.recorder import Recorder
from equilibria.train.resume import restore_run, save_run
from equilibria.train.run_folder import RunFolder
from equilibria.train.schedule import LearningRate
from equilibria.train.solves import jacobian_schedule
from equilibria.train.state import TrainState
from equilibria.train.step import Gradient


class Run:
    """Model, optimizer, place in the text and all else that a checkpoint holds, which the loop of `Trainer` moves along.

    Made anew, it goes on from the newest checkpoint in its folder, if there is one. In a job of several processes each has
    one, and all call the methods together.
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

    def _depth(self) -> int | None:
        """Blocks of the explicit stack during the warm-up phase; None afterwards."""
        optim = self.config.optim
        return optim.pretrain_depth if self.state.step < optim.pretrain_steps else None

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
        step, folder = self._failed_step(), self._failure()
        self.recorder.record_window(self.rate.rate)
        try:
            save_failure(
                folder,
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
            progress.note(f"the disk is full: {folder} could not be written")

    def _roll_back(self, error: NonFiniteError, progress: Progress) -> None:
        """Go back to the last checkpoint, but on with the text after what was read, where the memory is empty at first."""
        left, failed, folder = self.state, self._failed_step(), self._failure()
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
        progress.note(
            f"step {failed}: {reason(error)}; back to the checkpoint of step {self.state.step} "
            f"(roll-back {self.state.rollbacks} of {self.config.max_rollbacks}), and on with the text after that batch, "
            f"with an empty memory; see {folder}"
        )
        self.watch.end()

    def _failed_step(self) -> int:
        """Number of the step that failed, from 1; of a validation, that of the step before it."""
        return self.state.step + (self.watch.began is not None)

    def _failure(self) -> Path:
        return self.folder.failure(self._failed_step(), self.state.rollbacks)

    def _explain(self, error: NonFiniteError) -> str:
        after = f" after {self.state.rollbacks} roll-backs" if self.state.rollbacks else ""
        return (
            f"step {self._failed_step()}: {reason(error)}{after}; {self._kept()} with a smaller --lr, a smaller --clip or "
            f"a larger --warmup-steps; the batch is in {self._failure()}"
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
