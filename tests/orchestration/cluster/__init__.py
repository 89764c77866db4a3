"""Tests of orpo_ray.orchestration.cluster."""
