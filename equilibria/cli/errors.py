"""What the command line says of an error."""

from __future__ import annotations

import errno

EXTRAS = {
    "lm": (
        "accelerate", "cattrs", "filelock", "jinja2", "matplotlib", "numpy", "psutil", "safetensors", "tensorboard",
        "tokenizers", "tqdm", "tyro",
    ),
    "hf": ("datasets", "pyarrow", "transformers"),
}  # fmt: skip
"""An extra of the package -> the packages that it brings."""


def describe(error: BaseException) -> tuple[str, int] | None:
    """One line that says what to do, and the exit code; None for an error that is no fault of the user's."""
    import torch  # not needed to say that a package is missing, but by then it is there

    from equilibria.solution import NonFiniteError, UserError

    match error:
        case KeyboardInterrupt():
            return "aborted", 130
        case ModuleNotFoundError() if extra := _extra(error):
            return f'the package {_package(error)} is missing; install it with: pip install "equilibria[{extra}]"', 2
        case OSError(errno=errno.ENOSPC | errno.EFBIG):
            where = "" if error.filename is None else f" for {error.filename}"
            return f"no room on the disk{where} ({error.strerror}); free some space and try again", 2
        case OSError() if error.filename is not None:
            return f"cannot use {error.filename}: {error.strerror}; check the path, its permissions and the disk", 2
        case UserError():
            return str(error), 2
        case NonFiniteError():
            return str(error), 1
        case torch.OutOfMemoryError():
            return "the GPU is out of memory; try a smaller --batch-size or --length", 1
        case _:
            return None


def _extra(error: ModuleNotFoundError) -> str | None:
    """The extra that brings the missing package."""
    return next((extra for extra, names in EXTRAS.items() if _package(error) in names), None)


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").split(".")[0]
