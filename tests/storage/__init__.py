"""Tests of `orpo_ray.storage`."""
