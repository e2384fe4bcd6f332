"""Multiply bf16 and fp16 matrices on processors that have no instructions for them.

There torch multiplies element by element, 4 to 6 times slower than fp32. Here operands are widened, multiplied in fp32 and the
product is rounded: sums in fp32 and one rounding, as such instructions do it. What is scored stays the model in its own dtype.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW = 16
"""With fewer rows than this, widening the weights takes longer than it saves."""


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


def lacks_instructions(dtype: torch.dtype) -> bool:
    """Return True if this processor multiplies fp32 matrices faster than those of a smaller dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and not known[dtype]()
