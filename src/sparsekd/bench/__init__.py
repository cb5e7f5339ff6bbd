"""What compression buys. In: models; out: time to the first token and per token, memory, bytes on disk; time by kind,
and how much of what could be gained was gained.
"""

from sparsekd.bench.bounds import bytes_per_step as bytes_per_step
from sparsekd.bench.bounds import mlp_multiplications as mlp_multiplications
from sparsekd.bench.bounds import speedup_bound as speedup_bound
from sparsekd.bench.cells import Shape as Shape
from sparsekd.bench.intervals import estimate as estimate
from sparsekd.bench.latency import Plan as Plan
from sparsekd.bench.latency import compare as compare
from sparsekd.bench.points import Candidate as Candidate
from sparsekd.bench.points import frontier as frontier
from sparsekd.bench.points import require_format as require_format
from sparsekd.bench.profiling import PASSES as PASSES
from sparsekd.bench.profiling import profile as profile
from sparsekd.bench.profiling import require_new as require_new
from sparsekd.bench.runtimes import ATTENTIONS as ATTENTIONS
from sparsekd.bench.runtimes import DTYPES as DTYPES
from sparsekd.bench.runtimes import RUNTIMES as RUNTIMES
from sparsekd.bench.runtimes import attentions_here as attentions_here
from sparsekd.bench.runtimes import installed as installed
from sparsekd.bench.runtimes import not_installed as not_installed
from sparsekd.bench.runtimes import require as require
