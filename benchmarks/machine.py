"""Describe the machine a benchmark runs on, for its JSON object."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: torch.device | None = None) -> dict[str, object]:
    """The processor, what else was going on, the GPU if one is used, and the versions that matter.

    Args:
        device: Where the work was done; None is the CPU.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    found: dict[str, object] = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "peft", "safetensors", "ray", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # uipe_core alone needs neither Ray nor Optuna
    return found
