"""What a model costs in quality: perplexity by two protocols, with its uncertainty."""

from sparsekd.evaluate.perplexity import Perplexity, perplexity, ratio

__all__ = ["Perplexity", "perplexity", "ratio"]
