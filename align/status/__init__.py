"""A run's folder in, where it stands out: complete stages, progress, speed, stalls."""
