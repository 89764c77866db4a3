"""Tests of `orpo_ray.orchestration.sweep`."""
