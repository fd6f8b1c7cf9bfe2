"""Causal attention on every device: the definition, the choice, and one file per backend."""
