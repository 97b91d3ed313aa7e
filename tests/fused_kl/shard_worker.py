"""Worker of `test_sharded.py`: `torchrun shard_worker.py OUT` computes losses over a vocabulary
that is divided over the ranks, and the same in one process; their differences go to OUT/RANK.pt.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fused_kl import (
    adapters,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
)
from tests.fused_kl.conftest import Case

LEAVES = ("student_hidden", "student_lm_head", "student_bias")
OF_COLUMNS = (*LEAVES[1:], "teacher_lm_head", "teacher_bias", "allowed_columns")
VOCAB = 1187

# Columns of each rank: unequal; and equal, where the last rank's part is padded.
WIDTHS: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"unequal": (700, 487), "padded": (594, 594)},
    3: {"unequal": (300, 1, 886), "padded": (396, 396, 396)},
}


def build(name: str, **changes: Any) -> SimpleNamespace:
    tensors = Case(bias=True, vocab=VOCAB, **changes).build()
    if name.endswith("a rank without an allowed column"):
        tensors.allowed_columns[: WIDTHS[dist.get_world_size()]["unequal"][0]] = False
    weights = tensors.token_weights
    tensors.token_weights = weights.masked_fill(tensors.token_ids % 4 == 0, 0)
    return tensors


def part_of(tensors: SimpleNamespace, widths: tuple[int, ...]) -> SimpleNamespace:
    """This rank's part: its columns of everything that has columns; padding has random weights, and
    is not allowed."""
    part, edges = SimpleNamespace(**vars(tensors)), [0, *accumulate(widths)]
    here = slice(*edges[dist.get_rank() :][:2])
    padding = max(0, edges[-1] - VOCAB)
    generator = torch.Generator().manual_seed(3)
    for name in OF_COLUMNS:
        value = getattr(tensors, name).detach()
        more = torch.randn(padding, *value.shape[1:], generator=generator)
        value = torch.cat(
            [value, torch.zeros_like(more).bool() if value.dtype == torch.bool else more]
        )
        part_value = value[here].to(getattr(tensors, name).dtype)
        setattr(part, name, part_value.requires_grad_(getattr(tensors, name).requires_grad))
    hidden = tensors.student_hidden
    part.student_hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    return part


def divergence(tensors: SimpleNamespace, columns: bool = True, **rules: Any) -> Any:
    given = {
        name: getattr(tensors, name) for name in ("token_weights", "student_bias", "teacher_bias")
    }
    if columns:
        given["allowed_columns"] = tensors.allowed_columns
    sides = (tensors.student_hidden, tensors.student_lm_head)
    return linear_reverse_kl(
        *sides, tensors.teacher_hidden, tensors.teacher_lm_head, **given, **rules
    )


def of_tokens(function: Callable[..., Any], tensors: SimpleNamespace, **rules: Any) -> Any:
    chosen = tensors.allowed_columns if rules.pop("columns", True) else None
    sides = tensors.student_hidden, tensors.student_lm_head, tensors.token_ids
    rules = {name: value(tensors) if callable(value) else value for name, value in rules.items()}
    return function(*sides, allowed_columns=chosen, bias=tensors.student_bias, **rules)


def weights_of(tensors: SimpleNamespace) -> Tensor:
    return tensors.token_weights


POLICY: dict[str, Any] = {
    "advantages": lambda tensors: tensors.advantages,
    "old_logprobs": lambda tensors: tensors.advantages.double() - 7,
    "reference_logprobs": lambda tensors: tensors.advantages.double().roll(1) - 7,
    "token_weights": weights_of,
}
RULES = {"temperature": (0.7, 0.9), "softcap": (12.0, None)}
CASES: dict[str, Callable[..., Any]] = {
    **{
        f"{mode}, beta {beta}": partial(divergence, mode=mode, beta=beta, chunk_size=5, **RULES)
        for mode in ("fast", "lowmem")
        for beta in (0.0, 0.3, 1.0)
    },
    "per row": partial(divergence, reduction="none", beta=0.3),
    "one chunk": divergence,
    "all columns": partial(divergence, columns=False),
    "a rank without an allowed column": divergence,
    "lowmem of a rank without an allowed column": partial(divergence, mode="lowmem"),
    "ids": lambda tensors, **rules: divergence(tensors, token_ids=tensors.token_ids, **rules),
    "ids, lowmem": lambda tensors, **rules: divergence(
        tensors, token_ids=tensors.token_ids, mode="lowmem", **rules
    ),
    "sampled": lambda tensors, **rules: divergence(
        tensors, token_ids=tensors.token_ids, estimator="sampled", **rules
    ),
    "logprobs": partial(of_tokens, linear_logprobs),
    "logprobs, chunks": partial(of_tokens, linear_logprobs, chunk_size=4, temperature=0.7),
    "policy": partial(of_tokens, linear_policy_loss, clip=0.2, kl_coef=0.1, **POLICY),
    "policy with entropy": partial(
        of_tokens, linear_policy_loss, entropy_coef=0.3, chunk_size=4, **POLICY
    ),
    "cross-entropy": partial(
        of_tokens, linear_cross_entropy, columns=False, token_weights=weights_of
    ),
}
FIELDS = (
    "token_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprobs",
    "entropy",
    "logprobs",
)


def results_of(out: Any, tensors: SimpleNamespace) -> list[Tensor]:
    """Loss, values and gradients."""
    loss = out.logprobs if hasattr(out, "logprobs") and not hasattr(out, "loss") else out.loss
    finite = torch.where(loss.isfinite(), loss, 0)
    direction = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss.dtype)
    leaves = [x for x in (getattr(tensors, name) for name in LEAVES) if x.requires_grad]
    gradients = torch.autograd.grad((finite * direction).sum() if loss.dim() else loss, leaves)
    values = [getattr(out, name) for name in FIELDS if getattr(out, name, None) is not None]
    return [loss.detach(), *(value.detach() for value in values), *gradients]


def difference(name: str, widths: tuple[int, ...], **changes: Any) -> float:
    """The largest difference of a result from that of one process, by its largest value."""
    whole = build(name, **changes)
    if name.startswith("logprobs"):  # without a trained bias a single chunk prepares its gradients
        whole.student_bias.requires_grad_("chunks" in name)
    part = part_of(whole, widths)
    run = CASES[name]
    mine = results_of(run(part, group=dist.group.WORLD), part)
    truth = results_of(run(whole), whole)
    first = sum(widths[: dist.get_rank()])
    differences = []
    for actual, expected in zip(mine, truth, strict=True):
        if expected.shape[:1] == (VOCAB,):
            actual, expected = actual[: VOCAB - first], expected[first:][: len(actual)]
        assert actual.dtype == expected.dtype and actual.isnan().equal(expected.isnan())
        both = [torch.where(x.isfinite(), x, 0) for x in (actual, expected)]
        assert actual.isneginf().equal(expected.isneginf())
        scale = max(1e-6, float(both[1].abs().max())) if expected.numel() else 1.0
        differences.append(
            float((both[0] - both[1]).abs().max()) / scale if actual.numel() else 0.0
        )
    return max(differences)


def message_of(change: Callable[[SimpleNamespace], Any], function: Any = divergence) -> str:
    """What is raised if the last rank's arguments are changed."""
    part = part_of(build(""), WIDTHS[dist.get_world_size()]["unequal"])
    if dist.get_rank() == dist.get_world_size() - 1:
        change(part)
    try:
        function(part, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def replaced(**functions: Callable[[Tensor], Tensor]) -> Callable[[SimpleNamespace], None]:
    def change(part: SimpleNamespace) -> None:
        for name, function in functions.items():
            setattr(part, name, function(getattr(part, name)))

    return change


ROWS = ("student_hidden", "teacher_hidden", "token_weights", "token_ids")
BAD: dict[str, Callable[[], str]] = {
    "rows": lambda: message_of(replaced(**dict.fromkeys(ROWS, lambda x: x[:3]))),
    "hidden sizes": lambda: message_of(
        replaced(student_hidden=lambda x: x[:, :8], student_lm_head=lambda x: x[:, :8])
    ),
    "dtypes": lambda: message_of(
        replaced(
            teacher_hidden=Tensor.float, teacher_lm_head=Tensor.float, teacher_bias=Tensor.float
        )
    ),
    "no bias": lambda: message_of(lambda part: setattr(part, "student_bias", None)),
    "no gradient": lambda: message_of(replaced(student_hidden=Tensor.detach)),
    "its own": lambda: message_of(replaced(student_lm_head=lambda x: x[:, :8])),
    "other columns": lambda: message_of(
        replaced(teacher_lm_head=lambda x: x[1:], teacher_bias=lambda x: x[1:])
    ),
    "no column": lambda: message_of(
        lambda part: None,
        lambda part, **rules: divergence(
            SimpleNamespace(**vars(part) | {"allowed_columns": part.allowed_columns & False}),
            **rules,
        ),
    ),
    "options": lambda: message_of(
        lambda part: None,
        lambda part, **rules: divergence(part, temperature=1.0 + dist.get_rank(), **rules),
    ),
    "sparse": lambda: message_of(lambda part: None, partial(divergence, mode="sparse")),
    "ids": lambda: message_of(
        replaced(token_ids=lambda x: x + 10_000),
        lambda part, **rules: of_tokens(linear_logprobs, part, **rules),
    ),
    "policy": lambda: message_of(
        replaced(advantages=lambda x: x[:3]), partial(of_tokens, linear_policy_loss, **POLICY)
    ),
}


def fsdp_difference() -> float:
    """TRL's loss with heads and biases that FSDP2 shards, against whole ones."""
    whole = build("")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = SimpleNamespace(**vars(whole))
    for name in (*LEAVES[1:], "teacher_lm_head", "teacher_bias"):
        value = getattr(whole, name)
        shards = distribute_tensor(value.detach(), mesh, [Shard(0)])
        setattr(sharded, name, shards.requires_grad_(value.requires_grad))
    results = []
    for tensors in (sharded, whole):
        loss, *_ = adapters.chunked_divergence_loss(
            tensors.student_hidden[None],
            tensors.teacher_hidden[None],
            tensors.student_lm_head,
            tensors.teacher_lm_head,
            tensors.token_weights[None] != 0,
            0.3,
            student_lm_head_bias=tensors.student_bias,
            teacher_lm_head_bias=tensors.teacher_bias,
        )
        gradients = torch.autograd.grad(loss, [getattr(tensors, name) for name in LEAVES])
        results.append([x.full_tensor() if isinstance(x, DTensor) else x for x in gradients])
    pairs = zip(*results, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for kind, widths in WIDTHS[dist.get_world_size()].items():
        for name in CASES:
            if kind == "padded" and name in ("all columns", "cross-entropy"):
                continue  # padding has to be banned
            results[f"{name}, {kind}"] = difference(name, widths)
    results["fp32"] = difference(
        "one chunk", WIDTHS[dist.get_world_size()]["unequal"], dtype=torch.float32
    )
    results["fsdp"] = fsdp_difference()
    results["messages"] = {name: bad() for name, bad in BAD.items()}
    torch.save(results, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
