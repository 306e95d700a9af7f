"""Frozen scorers: texts (and images) in, numbers out."""
