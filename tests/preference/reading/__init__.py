"""Tests of `orpo_ray.preference.reading`."""
