"""`python -m sparsekd`, and so `torchrun -m sparsekd` and `accelerate launch -m sparsekd`."""

from sparsekd.cli import main

if __name__ == "__main__":
    main()
