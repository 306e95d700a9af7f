"""Frozen judges: texts (and images) in, numbers out."""
