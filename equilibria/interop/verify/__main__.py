"""python -m equilibria.interop.verify DIR [--only PATTERN] [--dtype float64|float32|both] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from equilibria.interop.verify.report import summary
from equilibria.interop.verify.run import DTYPES, verify
from equilibria.solution import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every case under DIR was checked and is as recorded, otherwise 1; 2 if the options make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m equilibria.interop.verify",
        description="Run the recorded cases of the original code again and compare.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of cases with a MANIFEST.json, or a single case")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name holds or matches this, such as 'trellis_*'")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both", help="of the precisions that a case demands")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all checks to this file")
    options = parser.parse_args(argv)
    dtypes = tuple(DTYPES) if options.dtype == "both" else (options.dtype,)
    start = time.perf_counter()
    checks = []
    try:
        for check in verify(options.folder, only=options.only, dtypes=dtypes):
            checks.append(check)
            print(check.line(), flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps([check.record() for check in checks], indent=1) + "\n", encoding="utf-8")
    print(summary(checks, time.perf_counter() - start))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
