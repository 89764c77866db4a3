"""Pages, model cards and live views, made from files alone; no torch, no Ray."""
