"""Fused kernels and compilation of decoder layers; in training workers."""
