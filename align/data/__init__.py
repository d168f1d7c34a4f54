"""Public data formats in; questions or pairs and their images out. One small file a format."""
