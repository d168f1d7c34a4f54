"""Iterative preference alignment of vision-language models: sample, score, DPO, round after round."""

__version__ = "0.1.0"
