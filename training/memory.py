"""Keeping freed memory in the process, which halves the time of a training step on a CPU."""

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_GIBIBYTE = 1 << 30


def keep_freed_memory() -> bool:
    """Ask glibc to hand no freed memory back to the system, and return whether it agreed.

    PyTorch has no caching allocator for the CPU: large tensors are mapped for every operation, and
    their pages are faulted in one by one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2 * _GIBIBYTE - 1), (_M_TOP_PAD, _GIBIBYTE))
    return all(mallopt(key, value) == 1 for key, value in settings)
