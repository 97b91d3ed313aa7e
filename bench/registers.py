"""What row programs of a given shape need of a GPU, found by compiling them, which needs none:
python -m bench.registers ARCHITECTURE BLOCK:WARPS [BLOCK:WARPS ...]

ARCHITECTURE is a compute capability without its dot, 90 for Hopper. Prints JSON: for each shape the
registers of a thread, bytes of spilled registers and of shared memory, the most of any program.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

Blocks = tuple[int, int]  # columns at once, warps
TYPES = {"allowed": "*u8", "token_ids": "*i64", "grad": "*bf16", "beta": "fp32"}
TYPES |= dict.fromkeys(("num_rows", "num_columns", "split_columns", "count"), "i32")
TYPES |= dict.fromkeys(("student_stride", "teacher_stride", "grad_stride", "stride"), "i32")


def programs() -> list[tuple[Any, dict[str, Any]]]:
    """Every row program with the flags that it is launched with."""
    from fused_kl import triton_device as device

    value, grad = {"WITH_VALUE": True, "WITH_GRAD": False}, {"WITH_VALUE": False, "WITH_GRAD": True}
    gradient = device.divergence_gradient
    return [
        (device.divergence_statistics, {}),
        (device.token_statistics, {}),
        (device.token_gradient, {}),
        *((gradient, {"KIND": kind} | value | grad) for kind in (0, 1)),
        *((gradient, {"KIND": kind} | which) for kind, which in product((0, 1, 2), (value, grad))),
    ]


def compiled(kernel: Any, flags: dict[str, Any], shape: Blocks, target: Any) -> Any:
    """One program as Triton compiles it for a target (`triton.backends.compiler.GPUTarget`)."""
    from triton.compiler import ASTSource, compile

    block, warps = shape
    names, constants = kernel.arg_names, {"BLOCK": block, "HAS_BANNED": True} | flags
    places = {(names.index(n),): value for n, value in constants.items() if n in names}
    signature = {n: TYPES.get(n, "constexpr" if n.isupper() else "*fp32") for n in names}
    return compile(ASTSource(kernel, signature, places), target, {"num_warps": warps})


def cuda_usage(made: Any) -> list[int]:
    """Registers, spilled and shared bytes of a program compiled for CUDA."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [re.search(rf"{what}:(\d+)", told) for what in ("REG", "STACK")]
    return [*(int(match[1]) for match in found if match), made.metadata.shared]


def usage_of(architecture: int, shapes: Sequence[Blocks]) -> dict[Blocks, dict[str, int]]:
    """The most that any program needs, by shape; each is compiled in a process of its own, which
    also lets Triton compile where this process interprets."""

    def one(shape: Blocks) -> dict[str, int]:
        wanted = ":".join(map(str, shape))
        command = [sys.executable, "-m", "bench.registers", str(architecture), wanted]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        (usage,) = json.loads(made.stdout).values()
        return usage

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(one, shapes), strict=True))


def main(arguments: list[str]) -> None:
    from triton.backends.compiler import GPUTarget

    architecture, *shapes = arguments
    target, found = GPUTarget("cuda", int(architecture), 32), {}
    for shape in shapes:
        block, warps = (int(number) for number in shape.split(":"))
        used = [cuda_usage(compiled(*program, (block, warps), target)) for program in programs()]
        most = (max(numbers) for numbers in zip(*used, strict=True))
        found[shape] = dict(zip(("registers", "spilled", "shared"), most, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
