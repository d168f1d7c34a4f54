"""Importing this registers our families with transformers' Auto classes."""

from align.models.load import load_model, load_processor, read_config

__all__ = ["load_model", "load_processor", "read_config"]
