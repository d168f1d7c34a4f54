"""Stage 3: preference pairs to a checkpoint, with TRL's DPO and every question encoded once."""

from align.versions import require_supported

require_supported()
