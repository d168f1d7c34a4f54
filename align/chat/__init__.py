"""`align chat`: a checkpoint and what people ask it in, its answers out, on a terminal or as a page."""
