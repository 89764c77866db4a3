"""transformers models as ORPO trains them: attention over packed rows, FSDP2, adapters, export."""
