"""Options of each side, a head that both sides share, and autocast."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kl import (
    LinearReverseKL,
    adapters,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    reference,
    topk_reverse_kl,
)
from fused_kl.arguments import DivergenceInputs, DivergenceOptions
from fused_kl.pair import is_tied
from tests.fused_kl.test_modes import assert_same, rules_of, sides

PER_SIDE: dict[str, Any] = {
    "temperature": (0.7, 1.4),
    "softcap": (12.0, None),
    "logit_scale": (1.3, 0.8),
}
MODES = ("fast", "lowmem")


@pytest.mark.parametrize("changed", [*PER_SIDE, "all", "softcaps"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_each_side_has_its_own_options(case, changed, mode, beta):
    tensors = case.build(bias=True)
    own = PER_SIDE if changed == "all" else {changed: PER_SIDE.get(changed)}
    own = {"softcap": (None, 9.0)} if changed == "softcaps" else own
    rules = rules_of(tensors) | own | {"beta": beta}
    out = linear_reverse_kl(*sides(tensors), **rules, mode=mode)
    assert_same(tensors, out, reference.linear_reverse_kl(*sides(tensors), **rules))


def test_other_losses_of_two_models_take_them_too(case):
    tensors = case.build()
    out = topk_reverse_kl(*sides(tensors), k=5, tail=True, **PER_SIDE)
    assert_same(
        tensors, out, reference.linear_reverse_kl(*sides(tensors), k=5, tail=True, **PER_SIDE)
    )
    tensors = case.build(logit_std=30.0)
    rules: dict[str, Any] = PER_SIDE | {"temperature": (0.7, 0.9)}
    out = linear_reverse_kl(*sides(tensors), mode="sparse", tolerance=1e-12, **rules)
    exact = reference.linear_reverse_kl(*sides(tensors), **rules)
    (actual,) = torch.autograd.grad(out.loss, tensors.student_hidden)
    (truth,) = torch.autograd.grad(exact[0], tensors.student_hidden)
    assert_close(actual, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": (1.0, 0.0)}, "temperature is 0.0, expected a finite number > 0"),
        (
            {"softcap": (1.0, 2.0, 3.0)},
            "softcap is (1.0, 2.0, 3.0), expected a number or a pair of two",
        ),
    ],
)
def test_wrong_options_of_a_side(case, rules, message):
    with pytest.raises(ValueError) as error:
        linear_reverse_kl(*sides(case.build()), **rules)
    assert str(error.value) == message


# A head that both sides share.


class Products(TorchDispatchMode):
    """Counts products that read a whole head of `vocab` rows."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "addmm" in func.__name__ and self.vocab in args[2].shape[1:]:
            self.count += 1
        return func(*args, **(kwargs or {}))


def tied(case, **changes) -> tuple[Any, tuple[Any, Any, Any, Any]]:
    """A student and a teacher of the same size with one head; the teacher's is detached."""
    tensors = case.build(teacher_size=16, **changes)
    head, bias = tensors.student_lm_head, tensors.student_bias
    tensors.teacher_lm_head = head.detach()
    tensors.teacher_bias = None if bias is None else bias.detach()
    return tensors, sides(tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [5, "auto"])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_shared_head_gives_the_same_and_is_read_once(case, mode, chunk_size, beta):
    tensors, inputs = tied(case, bias=True)
    rules = rules_of(tensors) | {"beta": beta, "token_ids": tensors.token_ids}
    options = {"mode": mode, "chunk_size": chunk_size}
    with Products(len(tensors.student_lm_head)) as once:
        out = linear_reverse_kl(*inputs, **rules, **options)
    del rules["token_ids"]
    assert_same(tensors, out, reference.linear_reverse_kl(*inputs, **rules))
    apart = (*inputs[:3], inputs[3].clone())
    with Products(len(tensors.student_lm_head)) as twice:
        linear_reverse_kl(*apart, **rules, **options)
    if mode == "fast":
        chunks = 1 if chunk_size == "auto" else 3
        assert (once.count, twice.count) == (chunks, 2 * chunks)


def test_estimator_and_topk_with_a_shared_head(case):
    tensors, inputs = tied(case)
    apart = (*inputs[:3], inputs[3].clone())
    for function in (
        partial(linear_reverse_kl, estimator="sampled", token_ids=tensors.token_ids),
        partial(topk_reverse_kl, k=7),
    ):
        outs = [function(*some) for some in (inputs, apart)]
        gradients = [torch.autograd.grad(out.loss, inputs[:2]) for out in outs]
        assert_close(outs[0].loss, outs[1].loss)
        assert_close(gradients[0], gradients[1])


def test_what_counts_as_a_shared_head(case):
    tensors, inputs = tied(case, bias=True)
    same, options = (inputs[2], inputs[3], tensors.teacher_bias), DivergenceOptions()

    def shared(teacher: tuple[Any, Any, Any] = same, rules: DivergenceOptions = options) -> bool:
        student = inputs[0], inputs[1], tensors.student_bias
        return is_tied(DivergenceInputs(*student, *teacher, None, None, None), rules)

    hidden, head, bias = same
    assert shared() and shared((hidden, head.view_as(head), bias))
    assert not shared((hidden, head.clone(), bias)) and not shared((hidden, head, None))
    assert not shared((hidden, head, bias.clone())) and not shared((hidden, head[1:], bias[1:]))
    assert not shared((hidden.float(), head, bias))
    assert not shared(rules=DivergenceOptions(teacher_temperature=2.0))
    assert not shared(rules=DivergenceOptions(mode="sparse"))


# Autocast: hidden states in bf16 and heads in fp32, as trainers with mixed precision have them.


def mixed(case) -> Any:
    tensors = case.build(dtype=torch.float32, bias=True)
    for name in ("student_hidden", "teacher_hidden"):
        hidden = getattr(tensors, name).detach().bfloat16()
        setattr(tensors, name, hidden.requires_grad_(name.startswith("student")))
    return tensors


def losses_of(tensors: Any) -> dict[str, Any]:
    """Every public loss from hidden states, and the adapters, as calls."""
    both = sides(tensors)
    one = tensors.student_hidden, tensors.student_lm_head, tensors.token_ids
    biases = {"student_bias": tensors.student_bias, "teacher_bias": tensors.teacher_bias}
    mask = torch.ones(1, len(one[0]))
    grouped = both[0][None], both[2][None], both[1], both[3]
    return {
        "fast": lambda: linear_reverse_kl(*both, **biases).loss,
        "lowmem": lambda: linear_reverse_kl(*both, **biases, mode="lowmem").loss,
        "sparse": lambda: linear_reverse_kl(*both, **biases, mode="sparse").loss,
        "module": lambda: LinearReverseKL(beta=0.5)(*both, **biases).loss,
        "topk": lambda: topk_reverse_kl(*both, k=5, **biases).loss,
        "logprobs": lambda: linear_logprobs(*one, bias=tensors.student_bias).logprobs.sum(),
        "policy": lambda: linear_policy_loss(*one, advantages=tensors.advantages).loss,
        "cross-entropy": lambda: linear_cross_entropy(*one).loss,
        "liger": lambda: adapters.LigerFusedLinearJSD()(*both),
        "liger chunked": lambda: adapters.LigerFusedLinearJSDLoss()(*both, tensors.token_ids),
        "trl": lambda: adapters.chunked_divergence_loss(*grouped, mask, 1.0)[0],
    }


LOSSES = ("fast", "lowmem", "sparse", "module", "topk", "logprobs", "policy", "cross-entropy")


@pytest.mark.parametrize("name", [*LOSSES, "liger", "liger chunked", "trl"])
def test_autocast_takes_inputs_as_torchs_linear_does(case, name):
    tensors = mixed(case)
    with pytest.raises(ValueError, match=r"has dtype torch\.float32, expected torch\.bfloat16 as"):
        losses_of(tensors)[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses_of(tensors)[name]()
    assert loss.dtype == torch.float32
    leaves = [tensors.student_hidden, tensors.student_lm_head]
    actual = torch.autograd.grad(loss, leaves)
    assert [gradient.dtype for gradient in actual] == [torch.bfloat16, torch.float32]
    cast = mixed(case)
    for side in ("student", "teacher"):
        for part in ("lm_head", "bias"):
            value = getattr(cast, f"{side}_{part}").detach().bfloat16()
            setattr(cast, f"{side}_{part}", value.requires_grad_(side == "student"))
    truth = losses_of(cast)[name]()
    assert torch.equal(loss, truth)
    expected = torch.autograd.grad(truth, [cast.student_hidden, cast.student_lm_head])
    # A sum of two losses adds their gradients in the dtype of the head.
    rounding = 2**-7 if name == "liger chunked" else 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs.to(mine.dtype), rtol=rounding, atol=rounding * 1e-3)


def test_autocast_leaves_fp64_alone(case):
    tensors = case.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_reverse_kl(*sides(tensors)).loss
    assert torch.equal(inside, linear_reverse_kl(*sides(tensors)).loss)
