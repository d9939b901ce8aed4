"""Does this library compute what the original code computed? Recorded cases of it, run again here.

`python -m equilibria.interop.verify DIR` prints one line for each quantity of each case, and fails if one does.

    cases.py         folders, manifests, checksums
    tolerances.py    how close is close enough
    report.py        what was compared
    kinds.py         what checks which case; one file for each kind
    run.py           all of it
"""
