"""A run directory, read and written as files alone: no torch, no Ray."""
