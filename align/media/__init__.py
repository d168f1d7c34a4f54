"""References in, verified pictures and video frames out; imports only errors."""
