"""The demo's pairs and model."""
