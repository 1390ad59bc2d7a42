"""What this machine's passes, steps and processes cost, each against a peer measured in the same run."""
