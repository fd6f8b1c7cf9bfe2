"""Text in: which files, how each format is read, uniform samples of it."""
