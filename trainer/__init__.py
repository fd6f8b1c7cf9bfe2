"""Time: loop, engines, optimizers, checkpoints, metrics."""
