"""`sparsekd compress`: the first part of a run, up to the smaller model."""

from sparsekd.cli.run import until

command = until("compress", "Run until the MLPs are smaller.")
