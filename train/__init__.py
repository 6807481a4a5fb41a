"""Training of capsule networks: command line, data, loop, checkpoints, pictures."""
