"""Weights on disk: every published layout, read and written."""
