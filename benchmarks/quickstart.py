"""How long does the README's first command take, and what does it reach?

Clones the last commit into an empty folder and runs the command there, word for word: a virtual environment, the
installation, the training of the DEQ-Transformer and of its twin, the evaluation. The run is left in runs/quickstart for
`benchmarks/generation.py`.

    python benchmarks/quickstart.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from harness import save

ROOT = Path(__file__).parents[1]


def main() -> None:
    (command,) = re.findall(r"^python3 -m venv .* train quickstart$", (ROOT / "README.md").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch) / "equilibria"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        start = time.perf_counter()
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=checkout, check=True)
        seconds = time.perf_counter() - start
        run = checkout / "runs" / "quickstart"
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        kept = ROOT / "runs" / "quickstart"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run, kept)
    print(f"the whole command took {seconds:.0f} s")
    save("quickstart", {**summary, "whole_command_seconds": seconds})


if __name__ == "__main__":
    main()
