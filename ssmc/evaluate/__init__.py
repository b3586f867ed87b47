"""Evaluation of models and artefacts."""

from ssmc.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
