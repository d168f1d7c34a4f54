"""The stages of a round, in order."""

STAGES = ("sample", "score", "pairs", "dpo", "evaluate")
