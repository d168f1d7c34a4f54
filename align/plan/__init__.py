"""`align plan`: what a run will need of memory, time and tokens, from its configuration and questions; no weights."""
