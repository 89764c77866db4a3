"""A second implementation of the objective: slow, padded, float64, and obviously right."""
