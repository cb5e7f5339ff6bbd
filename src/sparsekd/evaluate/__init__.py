"""What a model costs in quality. In: models and a text, or tasks; out: perplexity in two protocols, calibration,
agreement with the teacher, scores, each with its error; what a model says, and how fast it reads a prompt.
"""

from sparsekd.evaluate.measure import Measurement as Measurement
from sparsekd.evaluate.measure import measure as measure
from sparsekd.evaluate.perplexity import Perplexity as Perplexity
from sparsekd.evaluate.perplexity import perplexity as perplexity
from sparsekd.evaluate.perplexity import perplexity_in as perplexity_in
from sparsekd.evaluate.perplexity import perplexity_of as perplexity_of
from sparsekd.evaluate.perplexity import ratio as ratio
from sparsekd.evaluate.speed import Serving as Serving
from sparsekd.evaluate.speed import Session as Session
from sparsekd.evaluate.speed import prefill as prefill
from sparsekd.evaluate.speed import prompt as prompt
from sparsekd.evaluate.speed import timed as timed
from sparsekd.evaluate.windows import mean_and_error as mean_and_error
