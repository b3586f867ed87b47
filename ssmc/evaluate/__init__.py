"""Evaluation of models and artefacts."""

from ssmc.evaluate.last_word import LastWord, last_word
from ssmc.evaluate.perplexity import LengthRange, Perplexity, perplexity

__all__ = ["LastWord", "LengthRange", "Perplexity", "last_word", "perplexity"]
