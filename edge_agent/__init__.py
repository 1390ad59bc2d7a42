"""All that a board executes, and the truth that both sides share."""
