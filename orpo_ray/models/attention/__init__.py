"""Attention over a packed row: its mask, the kernels, and their interface to transformers."""
