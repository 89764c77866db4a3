"""Tests of `orpo_ray.runs`."""
