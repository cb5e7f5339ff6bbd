"""What a model costs in quality: perplexity in two protocols, calibration, agreement with the teacher, tasks."""

from sparsekd.evaluate.measure import Measurement, measure
from sparsekd.evaluate.perplexity import Perplexity, perplexity, perplexity_of, ratio

__all__ = ["Measurement", "Perplexity", "measure", "perplexity", "perplexity_of", "ratio"]
from sparsekd.evaluate.windows import mean_and_error as mean_and_error
