"""Peak memory of importing a full checkpoint: streamed shard by shard, against loading both models whole.

Makes a synthetic sharded Llama and a changed copy of it, imports the update vector in child processes of both kinds, checks
that both give the same bits, and prints one JSON object. Peak is VmHWM of the child (Linux), mapped pages of files included,
less what it was after imports. Everything written is deleted. Needs `uipe_core` alone, and 7 times the model's size on disk.

    python benchmarks/checkpoint_memory.py --repeats 3
    python benchmarks/checkpoint_memory.py --hidden 256 --layers 4 --shards 3      # a small one, in seconds
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from uipe_core.deltas.checkpoints import import_checkpoints
from uipe_core.deltas.files import save_update
from uipe_core.deltas.store import DeltaStore
from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.models.skeleton import open_initial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to write the models; a temporary folder when left out")
    parser.add_argument("--child", choices=("streamed", "whole"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child, options.dir)))
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-memory-", dir=options.dir))
    try:
        print(json.dumps(benchmark(options, folder), indent=1))
    finally:
        shutil.rmtree(folder)


def benchmark(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    for seed, name in enumerate(("initial", "checkpoint")):
        write_model(folder / name, config, shapes, options.shards, seed)
    sizes = [path.stat().st_size for path in (folder / "initial").glob("*.safetensors")]
    command = [sys.executable, __file__, "--dir", str(folder), "--child"]
    runs: dict[str, list[dict[str, float]]] = {"streamed": [], "whole": []}
    for _ in range(options.repeats):
        for kind, found in runs.items():
            if kind == "streamed":
                shutil.rmtree(folder / "streamed", ignore_errors=True)
            done = subprocess.run([*command, kind], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    streamed = next((folder / "streamed").rglob("*.safetensors"))
    middle = {kind: sorted(run["peak_over_imports"] for run in found)[len(found) // 2] for kind, found in runs.items()}
    return {
        "model_bytes": sum(sizes),
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "shards": len(sizes),
        "largest_shard_bytes": max(sizes),
        "largest_tensor_bytes": 2 * max(shape.numel() for shape in shapes.values()),
        "same_bits": same_bits(streamed, folder / "whole.safetensors"),
        "streamed": runs["streamed"],
        "baseline": "both models loaded whole by transformers, all differences in fp32, saved at once",
        "whole": runs["whole"],
        "streamed_peak_in_largest_shards": round(middle["streamed"] / max(sizes), 3),
        "streamed_peak_in_models": round(middle["streamed"] / sum(sizes), 3),
        "whole_peak_in_models": round(middle["whole"] / sum(sizes), 3),
        "streamed_to_whole": round(middle["streamed"] / middle["whole"], 4),
        "machine": machine(),
    }


def write_model(folder: Path, config: LlamaConfig, shapes: dict[str, torch.Size], shards: int, seed: int) -> None:
    """A model folder of bf16 numbers, a shard at a time; the numbers repeat, which makes no difference to memory."""
    config.save_pretrained(folder)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).bfloat16()
    share = sum(shape.numel() for shape in shapes.values()) / shards
    parts: list[dict[str, torch.Size]] = [{}]
    filled = 0.0
    for name, shape in shapes.items():
        if filled >= share * len(parts):
            parts.append({})
        parts[-1][name] = shape
        filled += shape.numel()
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            n: block.repeat(-(-s.numel() // block.numel()))[: s.numel()].reshape(s).contiguous() for n, s in part.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def measured(kind: str, folder: Path) -> dict[str, float]:
    """Run one kind in this process: seconds, and bytes of peak memory over what imports took."""
    torch.set_num_threads(1)
    before, started = peak(), time.perf_counter()
    if kind == "streamed":
        store = DeltaStore(folder / "streamed")
        import_checkpoints(open_initial(folder / "initial"), [(folder / "checkpoint", {"benchmark": kind})], store)
    else:
        load_both_whole(folder)
    return {"peak_over_imports": peak() - before, "imports": before, "seconds": round(time.perf_counter() - started, 2)}


def load_both_whole(folder: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto") for name in ("initial", "checkpoint")]
    initial, checkpoint = (dict(model.named_parameters()) for model in models)
    with torch.no_grad():
        update = {name: tensor.float() - initial[name].float() for name, tensor in checkpoint.items()}
    save_update(UpdateVector(DENSE, update), folder / "whole.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    with safe_open(one, framework="pt") as left, safe_open(other, framework="pt") as right:
        names = left.keys()
        return set(names) == set(right.keys()) and all(torch.equal(left.get_tensor(n), right.get_tensor(n)) for n in names)


def peak() -> int:
    """Peak resident memory of this process in bytes; not getrusage, which starts at the peak of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
