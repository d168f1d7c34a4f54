"""Critics, rankings and preference pairs: texts and images in, rewards and pairs out. Knows nothing of `align`."""
