"""Recognise out-of-memory errors of GPUs and of the host, and free memory."""

import errno
import gc

import torch

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory", "alloc_failed")
"""Messages of torch's CPU allocator and of the libraries below it, which raise a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def free_memory() -> None:
    """Collect garbage, and release GPU memory that torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
