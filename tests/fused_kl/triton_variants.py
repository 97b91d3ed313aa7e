"""Every Triton program in every variant that is launched, and compiling one, which needs no GPU."""

from collections.abc import Iterator
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
# Registers of a thread, so that 1,024 threads stay resident on a multiprocessor with its 65,536:
# the row programs' 528 and the four of scale_in_place on each of 132 multiprocessors, eight warps
# each, then run at once; of a summary's single warps all 32 that fit.
REGISTERS = 64


@dataclass(frozen=True)
class Variant:
    """A program as it is launched: its constants, its warps, and the types of pointers that have
    several."""

    kernel: Any
    constants: Kinds
    num_warps: int
    types: dict[str, str] = field(default_factory=dict)


def row_variants(shape: Blocks) -> Iterator[Variant]:
    """Every program over rows of logits in one shape."""
    from fused_kl import triton_divergence, triton_tokens

    block, num_warps = shape
    written = [{"grad": "*bf16"}, {"grad": "*fp32"}]
    for banned in (True, False):
        constants: Kinds = {"BLOCK": block, "HAS_BANNED": banned}
        yield Variant(triton_divergence.divergence_statistics, constants, num_warps)
        yield Variant(triton_tokens.token_statistics, constants, num_warps)
        for types, entropy in product(written, (True, False)):
            flags: Kinds = {"WITH_ENTROPY": entropy}
            yield Variant(triton_tokens.token_gradient, constants | flags, num_warps, types)
        for kind, value, grad in product((0, 1, 2), (True, False), (True, False)):
            # The JSD's gradient needs its value first; without both there is nothing to do.
            if (value and grad and kind == 2) or not (value or grad):
                continue
            flags = {"KIND": kind, "WITH_VALUE": value, "WITH_GRAD": grad}
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
    """A program as Triton compiles it for a target (`triton.backends.compiler.GPUTarget`), with
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
