"""Errors that mean there was not enough memory, on a GPU or beside it, and giving back what can be given back."""

import errno
import gc

import torch

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory", "alloc_failed")
"""What torch's allocator for the CPU and the libraries below it say: their error is a plain RuntimeError."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory was not enough, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def give_back() -> None:
    """Frees what nobody refers to any more, and what torch keeps on a GPU for later."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
