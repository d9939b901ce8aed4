"""Entry of the command `equilibria`: picks the subcommand and turns errors into one line and an exit code.

Nothing heavy but PyTorch, which the package itself imports, is imported before it is needed; for ctrl-C until then see
`equilibria.starting`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from equilibria.cli.errors import describe
from equilibria.starting import started

HELP = """\
usage: equilibria COMMAND ...

Deep equilibrium language models: a network that is one layer, solved for its fixed point.

commands
  train RECIPE       train a model; writes everything into a run folder
  eval RUN           measure how well the model of a run predicts text
  generate RUN       continue a text with the model of a run
  report RUN [RUN..] write one HTML page on runs: curves, convergence, comparison
  data               list, fetch and check data sets; show a text before training on it
  convert FILE RUN   turn a checkpoint of the code of Bai, Kolter & Koltun into a run
  export RUN FOLDER  write the model of a run for Hugging Face Transformers

  equilibria train quickstart                            a few minutes on a laptop, no files needed
  equilibria eval runs/quickstart
  equilibria generate runs/quickstart --prompt "The "

`equilibria COMMAND --help` explains a command, `equilibria train` lists the recipes.
`equilibria --version` prints the version.
"""

COMMANDS = ("train", "eval", "generate", "report", "data", "convert", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code.

    0: done, or stopped by ctrl-C after saving. 1: the numbers became infinite or NaN, or memory ran out. 2: something the
    user gave cannot be used. 130: aborted. In every case but 0, one line on standard error says what to do.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if (found := describe(error)) is None:
            raise
        return _fail(*found)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    name, rest = argv[0], argv[1:]
    if name in ("-V", "--version"):
        from equilibria import __version__

        print(f"equilibria {__version__}")
        return 0
    if (command := _command(name)) is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name}; {hint} (see equilibria --help)", 2)
    started()  # not before: an import somewhere below may swallow the exception that ctrl-C would raise in it
    return command(rest)


def _command(name: str) -> Callable[[Sequence[str]], int] | None:
    """The subcommand, whose file is imported here."""
    if name == "train":
        from equilibria.cli.train import train_command as command
    elif name == "eval":
        from equilibria.cli.evaluate import eval_command as command
    elif name == "generate":
        from equilibria.cli.generate import generate_command as command
    elif name == "report":
        from equilibria.cli.report import report_command as command
    elif name == "convert":
        from equilibria.cli.convert import convert_command as command
    elif name == "export":
        from equilibria.cli.export import export_command as command
    elif name == "data":
        from equilibria.cli.data import data_command as command
    else:
        return None
    return command


def _fail(message: str, code: int) -> int:
    """One line on standard error, whatever the message holds."""
    sys.stdout.flush()
    print(f"equilibria: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
