"""What the Triton programs need of a GPU, found by compiling them, which needs none:
python -m bench.kernels.registers ARCHITECTURE BLOCK:WARPS [BLOCK:WARPS ...]

ARCHITECTURE is a compute capability without its dot, 90 for Hopper. Prints JSON: for each shape of
the row programs the registers of a thread, bytes of spilled registers and of shared memory, the
most of any of them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Blocks = tuple[int, int]  # columns at once, warps
Kinds = dict[str, Any]  # constants of a program, by name
POINTERS = {"banned": "*u8", "token_ids": "*i64"}
INTEGERS = ("num_rows", "num_columns", "split_columns", "splits", "count")
INTEGERS += ("student_stride", "teacher_stride", "grad_stride", "stride")
TYPES = POINTERS | dict.fromkeys(INTEGERS, "i32") | {"beta": "fp32"}
# Splits that a summary reads at once, up to a row of 262,144 columns in blocks of 1,024.
SUMMARY_SPLITS = (32, 64, 128, 256)

# Threads that must stay resident on a multiprocessor, by program. Its 65,536 registers then leave
# each thread 64: the row programs' 528 and the four of scale_in_place on each of 132
# multiprocessors, eight warps each, run at once; of a summary's single warps all 32 that fit.
RESIDENT_THREADS = {
    "divergence_statistics": 1024,
    "divergence_summary": 1024,
    "divergence_gradient": 1024,
    "token_statistics": 1024,
    "token_summary": 1024,
    "token_gradient": 1024,
    "chosen_logprobs": 1024,
    "scale_in_place": 1024,
}
REGISTER_FILE = 65_536


@dataclass(frozen=True)
class Variant:
    """A program as it is launched: its constants, its warps, and the types of pointers that have
    several."""

    kernel: Any
    constants: Kinds
    num_warps: int
    types: dict[str, str] = field(default_factory=dict)

    @property
    def register_limit(self) -> int:
        """Of a thread, so that the intended programs stay resident."""
        return REGISTER_FILE // RESIDENT_THREADS[self.kernel.__name__]


def row_variants(shape: Blocks) -> Iterator[Variant]:
    """Every program over rows of logits in one shape."""
    from fused_kl import triton_divergence, triton_tokens

    block, num_warps = shape
    written = [{"grad": "*bf16"}, {"grad": "*fp32"}]
    for banned in (True, False):
        constants: Kinds = {"BLOCK": block, "HAS_BANNED": banned}
        yield Variant(triton_divergence.divergence_statistics, constants, num_warps)
        yield Variant(triton_tokens.token_statistics, constants, num_warps)
        for types in written:
            yield Variant(triton_tokens.token_gradient, constants, num_warps, types)
        for kind, value, grad in product((0, 1, 2), (True, False), (True, False)):
            # The JSD's gradient needs its value first; without both there is nothing to do.
            if (value and grad and kind == 2) or not (value or grad):
                continue
            flags: Kinds = {"KIND": kind, "WITH_VALUE": value, "WITH_GRAD": grad}
            for types in written if grad else [{}]:
                yield Variant(
                    triton_divergence.divergence_gradient, constants | flags, num_warps, types
                )


def other_variants() -> Iterator[Variant]:
    """Every program whose shape does not depend on the logits'."""
    from fused_kl import triton_divergence, triton_rows, triton_shared, triton_tokens

    for splits, kernel in product(
        SUMMARY_SPLITS, (triton_divergence.divergence_summary, triton_tokens.token_summary)
    ):
        shape = triton_rows.summary_program(splits)
        yield Variant(kernel, {"BLOCK": shape["BLOCK"]}, shape["num_warps"])
    for banned in (True, False):
        constants: Kinds = {"BLOCK": triton_rows.CHOSEN_BLOCK, "HAS_BANNED": banned}
        yield Variant(triton_tokens.chosen_logprobs, constants, triton_rows.CHOSEN_WARPS)
    for dtype in ("*fp32", "*bf16"):
        constants = {"BLOCK": triton_rows.SCALE_BLOCK}
        yield Variant(
            triton_shared.scale_in_place, constants, triton_rows.SCALE_WARPS, {"values": dtype}
        )


def compiled(variant: Variant, target: Any) -> Any:
    """One program as Triton compiles it for a target (`triton.backends.compiler.GPUTarget`), with
    pointers and sizes that are multiples of 16, as padded rows have them."""
    from triton.compiler import ASTSource, compile

    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    types = TYPES | variant.types
    signature = {n: types.get(n, "constexpr" if n.isupper() else "*fp32") for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    return compile(source, target, {"num_warps": variant.num_warps})


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
        command = [sys.executable, "-m", "bench.kernels.registers", str(architecture), wanted]
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
        used = [cuda_usage(compiled(variant, target)) for variant in row_variants((block, warps))]
        most = (max(numbers) for numbers in zip(*used, strict=True))
        found[shape] = dict(zip(("registers", "spilled", "shared"), most, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
