"""Tests of `orpo_ray.config`."""
