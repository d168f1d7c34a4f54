"""Pairs of a round's responses in, what people prefer out: a page for labelling, and the file of ratings behind it."""
