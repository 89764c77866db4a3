"""Optimizers whose state is smaller than that of AdamW."""
