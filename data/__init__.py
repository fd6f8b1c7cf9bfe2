"""The corpus: from text to batches. Knows no process groups; a rank arrives as two integers."""
