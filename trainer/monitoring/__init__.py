"""What a run says of itself, and what watches it."""
