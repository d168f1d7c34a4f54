"""Engines: answer questions and score continuations, in this process or on a server."""
