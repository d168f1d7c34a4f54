"""A command in, its processes out: ranks, launches, and one message for one fault of many processes."""
