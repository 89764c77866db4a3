"""Tests of what lies in `benchmarks`."""
