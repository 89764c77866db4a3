"""Faults injected into runs on local multi-node Ray, and what is left of the runs."""
