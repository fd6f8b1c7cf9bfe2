"""Gradients and updates, however ranks hold weights and states: DeepSpeed ZeRO and fold."""
