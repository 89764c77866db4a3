"""TRL's names: their table, and what becomes of each; nothing else in the project knows them."""
