"""A configuration of TRL, LLaMA-Factory or ms-swift in, what it is in align.yaml out, and what it is not."""
