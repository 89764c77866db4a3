"""What people look at: pages, cards and live views, made from files alone; no torch, no Ray."""
