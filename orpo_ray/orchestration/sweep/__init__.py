"""A sweep: Ray Tune over training runs."""
