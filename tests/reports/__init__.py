"""Tests of `orpo_ray.reports`."""
