"""The Ray that a command runs on: found, joined, kept to itself, and what becomes of workers."""
