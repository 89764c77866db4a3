"""ORPOTrainer and what it is made of: in-memory inputs, callbacks, history, adapters, the hub."""
