"""What ranks share of one network: the mesh of ranks, the kit of layers, collectives, Megatron-Core's layers; tensor, sequence,
context and pipeline parallelism."""
