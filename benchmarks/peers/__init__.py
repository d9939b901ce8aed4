"""Parts of `benchmarks/beside_peers.py`: problems, contenders, the check of what they return, the measurement.

Only `problems`, `check` and `torch_solvers` run without the peers' environment (requirements.txt).
"""
