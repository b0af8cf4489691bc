"""What a command costs before it does anything: whole processes, beside a Python that does nothing.

    python tests/benchmarks/bench_start.py [runs]

The runs of the four take turns, so that what else the machine does falls on all alike. Bytecode is compiled before, as pip
compiles what it installs. The adapter is generated: rank-64 LoRA
on the seven matrices of each layer of a Llama of 1.1 B parameters, 101 MB in bfloat16.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
RANK, LAYERS, WIDTH, INNER, KV = 64, 22, 2048, 5632, 256
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def write_adapter(folder: Path) -> int:
    """An adapter written without torch, so that this process stays small; returns its bytes."""
    table, end = {}, 0
    for layer in range(LAYERS):
        for module, (rows, columns) in SHAPES.items():
            for marker, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                start, end = end, end + 2 * shape[0] * shape[1]
                name = f"base_model.model.model.layers.{layer}.{module}.{marker}.weight"
                table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(0, end, 1 << 20):
            file.write(os.urandom(min(1 << 20, end + 8 + len(header) - file.tell())))
    targets = [module.rpartition(".")[2] for module in SHAPES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 8 + len(header) + end


def seconds(arguments: list[str], bytecode: str) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    own |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": bytecode}
    before, start = _cpu(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=own)
    return time.perf_counter() - start, _cpu() - before


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as bytecode:
        size = write_adapter(Path(folder))
        commands = {
            "python -c pass": ["-c", "pass"],
            "loratools --help": ["-m", "loratools", "--help"],
            "loratools inspect": ["-m", "loratools", "inspect", folder],
            "loratools inspect --json": ["-m", "loratools", "inspect", folder, "--json"],
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for arguments in commands.values():
            seconds(arguments, bytecode)
        for _ in range(runs):
            for name, arguments in commands.items():
                taken[name].append(seconds(arguments, bytecode))
    bare = [median(values) for values in zip(*taken["python -c pass"], strict=True)]
    print(f"adapter of {size / 1e6:.1f} MB, Python {sys.version.split()[0]}, median of {runs}, seconds")
    print(f"{'':26}{'wall':>8}{'beyond':>9}{'CPU':>8}{'beyond':>9}")
    for name, pairs in taken.items():
        wall, cpu = (median(values) for values in zip(*pairs, strict=True))
        print(f"{name:26}{wall:8.3f}{wall - bare[0]:9.3f}{cpu:8.3f}{cpu - bare[1]:9.3f}")


if __name__ == "__main__":
    main()
