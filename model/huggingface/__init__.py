"""Weights and configurations of Hugging Face models, in and out."""
