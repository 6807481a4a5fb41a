"""Training of capsule networks: options, data, loop, run folders, pictures."""
