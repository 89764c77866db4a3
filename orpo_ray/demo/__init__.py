"""The demo that runs without a config: generated preference pairs and a small model."""
