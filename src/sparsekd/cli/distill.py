"""`sparsekd distill`: the first part of a run, up to the trained model."""

from sparsekd.cli.run import until

command = until("distill", "Run until the compressed model is trained.")
