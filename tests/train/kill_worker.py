"""Trains in forked processes that are killed, or that find the disk full, and says what they left.

    python kill_worker.py FOLDER [SMALL]

prints a JSON object with the result of each experiment, or the traceback of what went wrong. SMALL is a folder on a file
system of about a megabyte, to fill up. A process that has imported everything forks one child for each attempt, so that an
attempt costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
from small_runs import CONFIG, losses, small_corpus, weights

from equilibria.recipes.build import build_model
from equilibria.solution import UserError
from equilibria.train import checkpoint
from equilibria.train.config import RunConfig
from equilibria.train.interrupt import StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder, read_metrics

torch.set_num_threads(1)
gc.freeze()  # or every run would search all that was imported for garbage, to measure its memory
CORPUS = small_corpus()
EVERY_STEP = dataclasses.replace(CONFIG, checkpoint_every=1, keep_checkpoints=2, trackers=("none",))


def trainer(folder: Path, config: RunConfig = EVERY_STEP, **options: Any) -> Trainer:
    torch.manual_seed(config.seed)
    made = Trainer(
        build_model(config, CORPUS.tokenizer.size), CORPUS, config, RunFolder(folder), stop=StopRequest(), **options
    )
    made.folder.store_config(config)
    return made


def outcome(run: Trainer) -> tuple[dict[int, Any], dict[str, bytes]]:
    """All that must not depend on what befell the run."""
    return losses(run), {name: tensor.numpy().tobytes() for name, tensor in weights(run).items()}


def in_child(work: Callable[[], None]) -> tuple[int, Callable[[], str]]:
    """Start `work` in a fork; its process id, and a function that waits for it and says how it ended: "" or in words."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 0
        sys.stderr = io.StringIO()
        try:
            work()
        except UserError as error:
            os.write(writing, str(error).encode())
            code = 2
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            code = 1
        finally:
            os._exit(code)
    os.close(writing)

    def wait() -> str:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        status = os.waitpid(pid, 0)[1]
        return "killed" if os.WIFSIGNALED(status) else said

    return pid, wait


def check_readable(folder: Path, at_least: int) -> int:
    """The step of the newest checkpoint of a run, whose files must all be whole, and no older than `at_least`."""
    run = RunFolder(folder)
    steps = run.checkpoints.steps()
    for step in steps:
        checkpoint.verify(run.checkpoints.path(step))
    if steps:
        checkpoint.verify(run.weights)
        newest = run.checkpoints.newest(checkpoint.load_state)
        logged = {row["step"] for row in read_metrics(run.metrics) if "train/loss" in row}
        assert logged >= set(range(1, newest["step"] + 1)), "a row is lost that the checkpoint follows on"
    newest_step = steps[-1] if steps else 0
    assert newest_step >= at_least, f"the run fell back from step {at_least} to {newest_step}"
    return newest_step


def check_tidy(folder: Path) -> None:
    """Nothing but what belongs there is left of killed processes, once the run has gone on."""
    left = [str(path) for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".new", ".old")]
    assert not left, left
    steps = RunFolder(folder).checkpoints.steps()
    assert len(steps) <= EVERY_STEP.keep_checkpoints, steps


def is_writing(folder: Path) -> bool:
    """Whether the scratch of a folder that is being written lies in a run."""
    parents = (each for each in (folder, folder / "checkpoints") if each.is_dir())
    return any(name.startswith(".") for each in parents for name in os.listdir(each))


def wait_until(condition: Callable[[], bool], at_most: float) -> None:
    end = time.perf_counter() + at_most
    while time.perf_counter() < end and not condition():
        pass


def go_on(folder: Path) -> None:
    """Write another checkpoint if anything is left to clear, which that does."""
    try:
        check_tidy(folder)
    except AssertionError:
        trainer(folder, last_step=5).run()


# -- killed at random --------------------------------------------------------------------------------------------


def at_random(folder: Path, count: int = 36) -> dict[str, Any]:
    whole = trainer(folder / "whole")
    started = time.perf_counter()
    whole.run()
    duration, draw = time.perf_counter() - started, random.Random(1)
    expected = outcome(whole)
    kills, finished, while_saving, number = 0, 0, 0, 0
    while kills < count:
        run, step = folder / f"run-{number}", 0
        number += 1
        while True:
            pid, wait = in_child(lambda run=run: trainer(run).run())
            time.sleep(draw.uniform(0, 0.7 * duration))
            if kills % 2:  # the next moment at which a folder is being written
                wait_until(lambda run=run: is_writing(run), at_most=duration)
            os.kill(pid, signal.SIGKILL)
            said = wait()
            while_saving += is_writing(run)
            step = check_readable(run, step)
            if said != "killed":
                assert said == "", said
                break
            kills += 1
            if kills >= count:
                trainer(run).run()
                break
        assert outcome(trainer(run)) == expected
        check_tidy(run)
        finished += 1
        shutil.rmtree(run)
    return {"kills": kills, "finished": finished, "while_saving": while_saving}


# -- killed, or out of space, at each operation ------------------------------------------------------------------


@contextlib.contextmanager
def at_operation(number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """`act()` before the n-th operation on the disk; what writes has then written half. The list names them all."""
    done: list[str] = []

    def due(name: str) -> bool:
        done.append(name)
        return len(done) == number

    def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            if due(name):
                act()
            return real(*args, **options)

        return instead

    def save_half(tensors: Any, path: Path, metadata: Any = None) -> None:
        real_save(tensors, path, metadata)
        if due("save_file"):
            os.truncate(path, path.stat().st_size // 2)
            act()

    def write_half(path: Path, text: str, **options: Any) -> None:
        if due("write_text"):
            real_write(path, text[: len(text) // 2], **options)
            act()
        real_write(path, text, **options)

    real_save, real_write = safetensors.torch.save_file, Path.write_text
    names = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
    real = {name: getattr(os, name) for name in names}
    try:
        for name, function in real.items():
            setattr(os, name, before(name, function))
        checkpoint.save_file = save_half  # type: ignore[assignment]
        Path.write_text = write_half  # type: ignore[assignment]
        yield done
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        checkpoint.save_file, Path.write_text = real_save, real_write


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_each_operation(folder: Path) -> dict[str, Any]:
    """The step from 3 to 4 ends with a validation, the best weights, a checkpoint and the removal of an old one."""
    begin = folder / "begin"
    first = trainer(begin, last_step=3)
    first.run()
    shutil.copytree(begin, folder / "whole")
    whole = trainer(folder / "whole", last_step=4)
    with at_operation(0, kill_self) as operations:
        whole.run()
    expected = outcome(whole)
    for number in range(1, len(operations) + 1):
        run = folder / "run"
        shutil.copytree(begin, run)

        def work(run: Path = run, number: int = number) -> None:
            with at_operation(number, kill_self):
                trainer(run, last_step=4).run()

        _, wait = in_child(work)
        assert wait() == "killed", number
        check_readable(run, 3)
        again = trainer(run, last_step=4)
        again.run()
        assert outcome(again) == expected, (number, operations[number - 1])
        go_on(run)
        check_tidy(run)
        shutil.rmtree(run)
    return {"operations": operations}


# -- a full disk -------------------------------------------------------------------------------------------------


def full_at_each_operation(folder: Path) -> dict[str, Any]:
    """The same step, where one operation finds no room and those after it do."""
    begin, run = folder / "begin", folder / "run"
    first = trainer(begin, last_step=3)
    first.run()
    whole = trainer(shutil.copytree(begin, folder / "whole"), last_step=4)
    valid = whole.evaluate("valid")
    valid = dataclasses.replace(valid, nll=valid.nll - 1)  # so that it will be the best
    with at_operation(0, kill_self) as operations:
        whole.run()
    expected = outcome(whole)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = []
    for number, operation in enumerate(operations, 1):
        if operation in ("unlink", "rmdir"):  # those give room
            continue
        made = trainer(shutil.copytree(begin, run), last_step=4)
        made.evaluate = lambda *_, **__: valid  # type: ignore[method-assign]
        try:
            with at_operation(number, refuse):
                made.run()
        except UserError as error:
            said.append(str(error))
        check_readable(run, 3)
        again = trainer(run, last_step=4)
        again.run()
        assert outcome(again)[1] == expected[1], (number, operation)
        go_on(run)
        check_tidy(run)
        shutil.rmtree(run)
    return {"said": said, "operations": operations}


Narrow = Callable[[int], contextlib.AbstractContextManager[None]]


def full(folder: Path, limits: list[int], narrow: Narrow) -> dict[str, Any]:
    """The same step, in less and less space."""
    begin = folder / "begin"
    trainer(begin, last_step=3).run()
    shutil.copytree(begin, folder / "whole")
    whole = trainer(folder / "whole", last_step=4)
    whole.run()
    expected = outcome(whole)
    shutil.rmtree(folder / "whole")
    said = []
    for limit in limits:
        run = folder / "run"
        shutil.copytree(begin, run)

        def work(run: Path = run, limit: int = limit) -> None:
            made = trainer(run, last_step=4)
            with narrow(limit):
                made.run()

        _, wait = in_child(work)
        said.append(wait())
        check_readable(run, 3)
        if said[-1]:
            assert not list(run.rglob(".*")), "scratch is left on the full disk"
        again = trainer(run, last_step=4)
        again.run()
        assert outcome(again) == expected, limit
        shutil.rmtree(run)
    return {"said": said}


@contextlib.contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def ballast(folder: Path) -> Narrow:
    @contextlib.contextmanager
    def fill(free: int) -> Iterator[None]:
        """Leave so many bytes on the file system of a folder."""
        path, disk = folder / "ballast", os.statvfs(folder)
        path.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - free)))
        try:
            yield
        finally:
            path.unlink()

    return fill


def attempt(experiment: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    try:
        return experiment(folder)
    except BaseException:
        return {"error": traceback.format_exc()}
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    results = {
        "killed at random": attempt(at_random, where / "random"),
        "killed at each operation": attempt(at_each_operation, where / "operations"),
        "full at each operation": attempt(full_at_each_operation, where / "full"),
        "largest file": attempt(lambda folder: full(folder, [100, 1000, 4000, 12000, 1 << 30], file_size), where / "files"),
    }
    if len(sys.argv) > 2:
        levels = [0, 8192, 16384, 24576, 36864, 45056, 1 << 19]
        results["full disk"] = attempt(lambda folder: full(folder, levels, ballast(folder)), Path(sys.argv[2]) / "full")
    print(json.dumps(results))
