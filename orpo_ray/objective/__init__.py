"""The ORPO objective as free functions on tensors; torch only, no transformers."""
