"""Tests of `orpo_ray.training.checkpoint`."""
