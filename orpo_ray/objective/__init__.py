"""Floor 1: the ORPO objective as free functions on tensors, importable with torch alone."""
