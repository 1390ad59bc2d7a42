"""What is true of a board and of a net before anyone learns."""
