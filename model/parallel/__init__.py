"""Tensor and sequence parallelism: the mesh of ranks, the kit of layers, collectives, Megatron-Core's layers."""
