"""Checkpoints: how one is written, when, and which is the best."""
