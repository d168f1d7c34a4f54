"""The only place that opens and saves checkpoints; importing it registers our families
with transformers' Auto classes."""

from align.versions import require_supported

require_supported()

from align.models.families import register  # noqa: E402  its imports fail with the versions that were just refused

register()
