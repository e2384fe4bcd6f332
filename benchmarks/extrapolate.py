"""Moving a model to another alpha: bytes per second, against the device's own copy of as many, measured in the same run.

A walk reads theta_init and the update and writes the model. Timed are alphas one after the other on one update (what a search
does most), with the update at hand and with it in its file; and a first walk, for which everything must be fetched. The
baseline is `Tensor.copy_` on the same device between two buffers as large as the model; a ratio is bytes per second over its
bytes per second, reading and writing both counted. Low-rank updates are scaled, which moves nothing: their milliseconds.
Prints one JSON object. Needs `uipe_core` alone.

    python benchmarks/extrapolate.py                                # a Llama of 113 million parameters in fp32, on the CPU
    python benchmarks/extrapolate.py --model 7b --device cuda       # 7B-shaped, random weights, bf16; 45 GB of disk
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from models import SHAPES, random_llama

from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.files import load_update, save_streamed
from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector, snapshot
from uipe_core.models.loading import resolve_device
from uipe_core.models.transformers_compat import adapter_state, wrap_adapter

LORA = {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="100m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, float32 on the CPU when left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to write the update; a temporary folder when left out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = random_llama(options.model, device, getattr(torch, name))
    with tempfile.TemporaryDirectory(prefix="extrapolate-", dir=options.dir) as folder:
        print(json.dumps(benchmark(model, device, Path(folder) / "update.safetensors", options), indent=1))


def benchmark(model: Any, device: torch.device, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    entries = sum(parameter.numel() for parameter in model.parameters())
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    draws = torch.Generator().manual_seed(1)
    save_streamed(path, shapes, ((key, torch.randn(shape, generator=draws).mul_(2e-5)) for key, shape in shapes.items()))
    moved = 2 * weights + 4 * entries  # theta_init and the model in their dtype, the update in fp32
    copy = copy_rate(weights, device, options.repeats)
    in_file = load_update(path)
    in_memory = UpdateVector(in_file.kind, {key: tensor.clone() for key, tensor in in_file.tensors.items()})
    cases: dict[str, Any] = {}
    for title, update in (("update in memory", in_memory), ("update in its file", in_file)):
        walker = Extrapolator(model, snapshot(model))
        first = seconds(lambda walker=walker, update=update: walker.apply(update, 0.1), device)
        later = [
            seconds(lambda walker=walker, update=update, step=step: walker.apply(update, 0.1 * step), device)
            for step in range(1, options.repeats + 1)
        ]
        typical = statistics.median(later)
        cases[title] = {
            "first_walk_seconds": round(first, 4),
            "seconds": round(typical, 4),
            "gigabytes_per_second": round(moved / typical / 1e9, 2),
            "ratio_to_copy": round(moved / typical / copy, 3),
            "first_walk_ratio_to_copy": round(moved / first / copy, 3),
        }
        walker.reset()
        del walker
    return {
        "benchmark": "extrapolate",
        "baseline": "Tensor.copy_ between two buffers of the model's size on the same device",
        "model": {"shape": options.model, "parameters": entries, "dtype": str(next(model.parameters()).dtype)},
        "bytes_moved": moved,
        "copy_gigabytes_per_second": round(copy / 1e9, 2),
        "dense": cases,
        "low_rank_milliseconds": round(1e3 * low_rank_seconds(model, device, options.repeats), 3),
        "repeats": options.repeats,
        "machine": machine(device),
    }


def copy_rate(size: int, device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a copy within the device."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(repeats))


def low_rank_seconds(model: Any, device: torch.device, repeats: int) -> float:
    """Of a walk along a LoRA update that is loaded already."""
    walker = Extrapolator(model)
    wrapped = wrap_adapter(model, LORA)
    state = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in adapter_state(wrapped).items()}
    walker.model = wrapped.unload()
    update = UpdateVector(LOW_RANK, state, LORA)
    walker.apply(update, 0.1)
    return statistics.median(seconds(lambda step=step: walker.apply(update, 0.1 * step), device) for step in range(repeats))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
