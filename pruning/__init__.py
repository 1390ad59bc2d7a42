"""Makes a net small enough for a board before training, and exports it."""
