"""The only place that opens and saves checkpoints; importing it registers our families with transformers' Auto classes."""

from align.models.families import register

register()
