"""A checkpoint and held-out questions in, metrics with intervals out: accuracy, win rates, KL, tables, comparisons."""
