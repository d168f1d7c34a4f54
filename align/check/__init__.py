"""A configuration in, every problem that its run would meet out, before anything expensive begins."""
