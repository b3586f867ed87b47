"""Evaluation of models and artefacts."""

from ssmc.evaluate.perplexity import LengthRange, Perplexity, perplexity

__all__ = ["LengthRange", "Perplexity", "perplexity"]
