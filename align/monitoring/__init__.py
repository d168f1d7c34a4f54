"""What a process says of itself: progress, heartbeat, cost, memory; imports nothing of a run's folder."""
