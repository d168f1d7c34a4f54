"""Shared-prefix attention: a prompt encoded once, many continuations behind it."""
