"""Operations that have a Triton kernel beside their plain PyTorch form: each folder chooses between the two, call by call.

`reference.py` says what is computed and runs everywhere; `triton.py` computes the same in fewer passes over memory and is
imported only where it can run (see `choice`).
"""
