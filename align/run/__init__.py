"""A run's folder in and out: paths, locks, manifests, hashes, resumable files, the table of stages;
below all stages."""
