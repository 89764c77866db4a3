"""Tests of the files that start the project on a cluster."""
