"""Training of language models: configuration, loop, evaluation, checkpoints, run folders and reports."""
