"""A token set on disk, and the batches of a rank: numpy and pyarrow, no torch, no Ray."""
