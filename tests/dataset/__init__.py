"""Tests of `orpo_ray.dataset`."""
