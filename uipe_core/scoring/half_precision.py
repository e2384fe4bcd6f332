"""Multiply bf16 and fp16 matrices on processors that have no instructions for them.

There torch multiplies element by element, 4 to 6 times slower than fp32. Here operands are widened, multiplied in fp32 and the
product is rounded: sums in fp32 and one rounding, as such instructions do it. What is scored stays the model in its own dtype.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW = 16
"""With fewer rows than this, widening the weights takes longer than it saves."""


TIMED, REPEATS = 1024, 5
"""Rows and columns of the products that are timed, and how often each is: 0.2 s in all on a slow core."""

LARGE, CLEARLY = 20_000_000, 1.5
"""Parameters from which on products take most of the time, and how many times as fast a dtype is worth its rounding."""


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or args[0].numel() < FEW * args[0].shape[-1]:
            return func(*args, **(kwargs or {}))
        rows, weight, *bias = args
        widened: Tensor = func(rows.float(), weight.float(), *(None if values is None else values.float() for values in bias))
        return widened.to(rows.dtype)


def fast_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which linear layers of that dtype multiply as fast as the device can."""
    return _Widened() if device.type == "cpu" and lacks_instructions(dtype) else nullcontext()


def faster_in_bfloat16(parameters: int) -> float | None:
    """Return how many times as fast this processor multiplies in bfloat16, for a model of so many parameters; None where that
    is not worth the rounding."""
    speed = bfloat16_speed() if parameters >= LARGE else 0.0
    return speed if speed >= CLEARLY else None


def bfloat16_speed() -> float:
    """Return how many times as fast this processor multiplies bfloat16 matrices as float32 ones, by timing products of both."""

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(TIMED, TIMED, dtype=dtype), torch.ones(TIMED, TIMED, dtype=dtype)
        times = []
        with torch.inference_mode(), fast_products(dtype, rows.device):
            for _ in range(REPEATS):
                started = time.perf_counter()
                F.linear(rows, weight)
                times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def lacks_instructions(dtype: torch.dtype) -> bool:
    """Return True if this processor multiplies fp32 matrices faster than those of a smaller dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and not known[dtype]()
