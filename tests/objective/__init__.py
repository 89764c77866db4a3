"""Tests of objective."""
