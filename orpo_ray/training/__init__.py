"""Floor 2: one ORPO worker under torch.distributed, without Ray."""
