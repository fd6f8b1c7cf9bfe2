"""The network: decoder, attention, positions, tensor parallelism, loss, generation, and what it costs.

Shapes are written as suffixes. Upper case is the full size, lower case this rank's slice:
`T` tokens (B * S flattened), `B` batch, `S` sequence, `D` hidden, `N` query heads, `K` key-value heads,
`H` head dimension, `F` mlp, `V` vocabulary, `C` the last tokens of a
sequence, where only those are queries. The residual stream is `x_TD`.
"""
