"""Feed-forward layers of a block, one kind per file."""
