"""`sparsekd corpus`: the first part of a run, up to the token blocks."""

from sparsekd.cli.run import until

command = until("corpus", "Run until the token blocks are there.")
