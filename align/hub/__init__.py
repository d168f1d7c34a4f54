"""A checkpoint in, its model card and its upload to the Hugging Face Hub out."""
