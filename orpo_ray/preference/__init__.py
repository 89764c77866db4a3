"""Preference pairs, from a row of a file to a prompt group of token ids; no torch, no Ray."""
