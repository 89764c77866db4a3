"""Which metrics differ between two runs that are otherwise the same to the byte."""

from orpo_ray.runs.files import TIME_PARTS, TIME_PREFIX

TIMING = ("time", "pairs_per_s", "tokens_per_s", "mfu", *(TIME_PREFIX + p for p in TIME_PARTS))
