"""Figures of runs and corpora."""
