"""The settings of a run: their table, files of them, and what they refuse."""
