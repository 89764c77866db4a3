"""Tests of `orpo_ray.demo`."""
