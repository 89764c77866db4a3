"""Tests of `orpo_ray.models`."""
