"""What a process says of itself while it works: progress, speed, memory, and what it has cost."""
