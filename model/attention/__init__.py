"""Causal self-attention: grouped-query and latent, windowed layers, the cache of decoding, and the kernels."""
