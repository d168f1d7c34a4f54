"""How long a test waits for another process: so long that only a hung one fails it, never a busy machine."""

PATIENCE_S = 1800
