"""Floor 3: Ray. Ingest, feed, workers and the commands' entry points; the only floor with Ray."""
