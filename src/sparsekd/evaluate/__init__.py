"""What a model costs in quality. In: models and a text, or tasks; out: perplexity in two protocols, calibration,
agreement with the teacher, scores, each with its error.
"""

from sparsekd.evaluate.measure import Measurement, measure
from sparsekd.evaluate.perplexity import Perplexity, perplexity, perplexity_of, ratio
from sparsekd.evaluate.speed import prefill

__all__ = ["Measurement", "Perplexity", "measure", "perplexity", "perplexity_of", "prefill", "ratio"]
from sparsekd.evaluate.windows import mean_and_error as mean_and_error
