"""Checkpoints: complete or invisible, and any layout resumes any of them."""
