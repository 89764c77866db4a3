"""Every family of transformers' causal mapping: exact, or refused by name."""
