"""`align selftest`: a machine in, what works on it and how fast it is out; one screen, one JSON for a bug report."""
