"""From shards to batches: order, mixture, held-out text."""
