"""Environment variables that configure the memory allocators of workers; on the driver."""

import os

# A step on the host frees and asks again for the same large tensors: glibc, which by default gives
# them back to the system each time, made 2.3 million page faults in 40 steps of a 5 M model, and
# the step a tenth slower (benchmarks/RESULTS.md).
_HOST_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(10**9),
    "MALLOC_TOP_PAD_": str(10**8),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 10**9),
    # oneDNN keeps up to 1,024 kernels that multiply in bfloat16, one for every shape, and torch as
    # many layers above them: packed rows are of any length, so most are never asked for again. A
    # step of one row has some thirty shapes (benchmarks/RESULTS.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
# On a GPU no two packed rows are of one length: segments that grow serve them all, where those of
# fixed sizes leave holes. By its old name, which every torch reads.
_DEVICE_MEMORY = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def memory_settings(use_gpu: bool) -> dict[str, str]:
    """Environment of processes that compute, for their allocator; what the driver has set stays."""
    settings = _DEVICE_MEMORY if use_gpu else _HOST_MEMORY
    return {name: os.environ.get(name, value) for name, value in settings.items()}
