"""What would happen on a GPU, found without one: devices, dtypes, kernels, memory, waits.

    python benchmarks/fake_cuda/bench_fake_cuda.py --out benchmarks/results/fake_cuda.json

Needs torch's CUDA build and a C compiler, but neither a GPU nor its driver: on a runtime that
claims a GPU and does nothing, fake tensors of device "cuda" go through autograd, autocast and
torch's own choice of kernels. Nothing is computed and nothing timed. Takes some minutes.

The part `waits` runs on the CPU, with any build of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from dtypes_and_kernels import dtypes, kernels
from memory_and_head import head, memory
from report import publish
from training_steps import devices, waits

PARTS: dict[str, Callable[[], Any]] = {
    "devices": devices,
    "dtypes": dtypes,
    "kernels": kernels,
    "memory": memory,
    "head": head,
    "waits": waits,
}
HOPPER, AMPERE = "9.0", "8.0"


def build(folder: Path, capability: str) -> Path:
    """Compile the runtime of a GPU of this compute capability."""
    major, minor = capability.split(".")
    library = folder / f"runtime-{capability}.so"
    source = Path(__file__).with_name("runtime.c")
    numbers = [f"-DMAJOR={major}", f"-DMINOR={minor}"]
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *numbers]
    subprocess.run(["cc", *options, "-o", library, source], check=True)
    return library


def on_runtime(library: Path, part: str) -> Any:
    """Run a part in a process that has this runtime."""
    print(f"-- {part}, {library.stem}", file=sys.stderr)
    command = [sys.executable, __file__, "--in-process", part]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    # Its last line is the result; transformers may print others.
    output = subprocess.check_output(command, env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def measure(parts: Sequence[str]) -> dict[str, Any]:
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part == "waits":
                result[part] = waits()
                continue
            capabilities = (HOPPER, AMPERE) if part == "kernels" else (HOPPER,)
            found = {c: on_runtime(build(Path(folder), c), part) for c in capabilities}
            result[part] = found if len(found) > 1 else found[HOPPER]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--in-process", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(PARTS[args.in_process]()))
        return
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}.")
    if torch.version.cuda is None and parts != ["waits"]:
        parser.error(
            f"torch {torch.__version__} is not a CUDA build: install one beside this package in a "
            "virtual environment of its own (pip install torch==2.13.0), or choose --only waits."
        )
    publish(measure(parts), args.out)


if __name__ == "__main__":
    main()
