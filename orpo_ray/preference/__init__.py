"""Floor 1: what a preference pair is, from a line of a file to a packed row of tokens."""
