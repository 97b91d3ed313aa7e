"""Mode "sparse" against the dense definition in fp64: what it leaves out, and the bound that it
gives on the error."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_kl import linear_reverse_kl, reference
from fused_kl.arguments import LinearKLOutput

TOLERANCES = (1e-1, 1e-2, 1e-4)


def peaked(case: Any, num_rows: int, vocab: int, tail: str, std: float, **changes: Any) -> Any:
    """Student and teacher of a case; with a Zipf tail, column j is j + 1 times less likely than the
    first in every row, else logits are Gaussian. A larger `std` makes rows more peaked."""
    tensors = case.build(num_rows=num_rows, vocab=vocab, logit_std=std, gap=changes.pop("gap", 1.0))
    if tail == "zipf":
        with torch.no_grad():
            bias = -1.5 * torch.arange(1, vocab + 1, dtype=torch.float64).log()
            tensors.student_bias = bias.clone().requires_grad_()
            tensors.teacher_bias = bias
    return tensors


def run(tensors: Any, **options: Any) -> tuple[LinearKLOutput, list[Tensor]]:
    """The result, and the gradients of hidden states, head and bias."""
    leaves = [tensors.student_hidden, tensors.student_lm_head]
    if tensors.student_bias is not None:
        leaves.append(tensors.student_bias)
        options |= {"student_bias": tensors.student_bias, "teacher_bias": tensors.teacher_bias}
    sides = tensors.teacher_hidden, tensors.teacher_lm_head
    out = linear_reverse_kl(*leaves[:2], *sides, **options)
    return out, list(torch.autograd.grad(out.loss, leaves))


def errors_by_row(tensors: Any, support: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """L1 norm of what the gradient by the logits is off by on a support: by the definition."""
    logits = []
    for side in ("student", "teacher"):
        hidden, head = getattr(tensors, f"{side}_hidden"), getattr(tensors, f"{side}_lm_head")
        bias = getattr(tensors, f"{side}_bias")
        z = hidden.detach() @ head.detach().t()
        z = (z if bias is None else z + bias.detach()) / options.get("temperature", 1.0)
        allowed = options.get("allowed_columns")
        logits.append(z if allowed is None else z.masked_fill(~allowed, -torch.inf))
    s, t = (z.log_softmax(-1) for z in logits)
    p, ratio = s.exp(), torch.where(s.isneginf(), 0, s - t)
    exact = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    kept = torch.zeros_like(p)
    kept[:, support] = p[:, support]
    # With a single column in the support no gradient says which: it is 0 for any mean.
    mean = (kept * ratio).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-300)
    return weights * (exact - kept * (ratio - mean)).abs().sum(-1) / options.get("temperature", 1.0)


@pytest.mark.parametrize("tail", ["zipf", "gaussian"])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0, 8.0, 30.0])
@pytest.mark.parametrize("gap", [0.01, 3.0])
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 999), (37, 999), (256, 5003)])
def test_the_error_is_within_the_bound(
    case: Any, tail: str, std: float, gap: float, num_rows: int, vocab: int
) -> None:
    check_bound(case, tail, std, gap, num_rows, vocab)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "vocab"), [(1024, 50_257), (37, 151_936)])
@pytest.mark.parametrize(("tail", "std"), [("zipf", 8.0), ("gaussian", 3.0), ("gaussian", 30.0)])
def test_the_error_is_within_the_bound_at_size(
    case: Any, tail: str, std: float, num_rows: int, vocab: int
) -> None:
    check_bound(case, tail, std, 1.0, num_rows, vocab)


def check_bound(case: Any, tail: str, std: float, gap: float, num_rows: int, vocab: int) -> None:
    tensors = peaked(case, num_rows, vocab, tail, std, gap=gap)
    dense, exact = run(tensors)
    for tolerance in TOLERANCES:
        rules = {"tolerance": tolerance, "chunk_size": num_rows}  # one chunk
        out, gradients = run(tensors, mode="sparse", **rules)
        support = out.support
        assert support is not None and support.left_out.shape == (num_rows,)
        assert bool((support.left_out <= tolerance).all())
        columns = int(support.columns.sum())
        dense_rows = int(support.dense_rows)
        assert_close(out.student_entropy, dense.student_entropy, rtol=1e-9, atol=1e-12)
        assert bool((out.token_kl <= dense.token_kl + 1e-12).all())
        if dense_rows == num_rows:
            assert_close(out.token_kl, dense.token_kl)
            continue
        # The bias's gradient is the sum of the rows' gradients; so is everything else, times what
        # the rows are multiplied by.
        bound = support.gradient_bound
        hidden_error = (gradients[0] - exact[0]).norm(dim=1)
        largest = float(tensors.student_lm_head.detach().norm(dim=1).amax())
        assert bool((hidden_error <= bound * largest + 1e-12).all())
        if len(gradients) == 3:
            assert float((gradients[2] - exact[2]).abs().sum()) <= float(bound.sum()) + 1e-12
        if dense_rows:  # which use every column
            continue
        # Rows of the head outside of the support are exactly 0.
        used = gradients[1].abs().sum(1).nonzero().flatten()
        assert len(used) <= columns
        weights = torch.ones(num_rows, dtype=torch.float64)
        by_row = errors_by_row(tensors, used, weights)
        assert bool((by_row <= bound + 1e-12).all())
        assert float(by_row.max()) > 0


def test_a_few_flat_rows_take_the_dense_path_alone(case: Any) -> None:
    tensors = peaked(case, 100, 5003, "gaussian", 30.0)
    flat = [3, 50, 77]
    with torch.no_grad():
        tensors.student_hidden[flat] *= 0.001
    _, exact = run(tensors)
    rules = {"token_ids": tensors.token_ids, "token_weights": tensors.token_weights}
    out, gradients = run(tensors, mode="sparse", tolerance=1e-3)
    support = out.support
    assert support is not None
    assert 3 <= int(support.dense_rows) < 30 and 0 < int(support.columns) < 4000
    assert_close(gradients[0][flat], exact[0][flat], rtol=1e-12, atol=1e-12)
    assert bool((support.left_out[flat] == 0).all() and (support.left_out <= 1e-3).all())
    for actual, expected in zip(gradients, exact, strict=True):
        assert 0 < float((actual - expected).norm()) < 1e-2 * float(expected.norm())
    (dense, _), (weighted, _) = run(tensors, **rules), run(tensors, mode="sparse", **rules)
    assert_close(weighted.student_logprobs, dense.student_logprobs, rtol=1e-9, atol=1e-12)
    assert_close(weighted.token_kl[flat], dense.token_kl[flat], rtol=1e-9, atol=1e-12)


def test_everything_at_once(case: Any) -> None:
    tensors = peaked(case, 37, 999, "zipf", 6.0)
    weights = tensors.token_weights.clone()
    weights[[3, 20]] = 0.0
    rules = {
        "token_weights": weights,
        "allowed_columns": tensors.allowed_columns[:999],
        "token_ids": tensors.token_ids,
        "temperature": 0.7,
    }
    dense, exact = run(tensors, **rules)
    with torch.no_grad():
        tensors.student_hidden[3] = torch.nan  # a row of weight 0 may hold anything
    out, gradients = run(tensors, mode="sparse", tolerance=1e-3, chunk_size=10, **rules)
    support = out.support
    assert support is not None and len(support.columns) == 4
    assert bool((support.columns < 999).all()) and out.plan.rows == 10
    assert support.left_out[3] == support.gradient_bound[20] == out.token_kl[3] == 0
    assert_close(out.student_logprobs, dense.student_logprobs, rtol=1e-9, atol=1e-12)
    for actual, expected in zip(gradients, exact, strict=True):
        assert float((actual - expected).norm()) < 5e-3 * float(expected.norm())
    bound = support.gradient_bound
    error = (gradients[0] - exact[0]).norm(dim=1)
    largest = float(tensors.student_lm_head.detach().norm(dim=1).amax())
    assert bool((error <= bound * largest + 1e-12).all()) and error[3] == 0
    banned = ~tensors.allowed_columns[:999]
    assert bool((gradients[1][banned] == 0).all())


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_softcap_and_a_scale(case: Any, softcap: float | None) -> None:
    tensors = peaked(case, 20, 999, "zipf", 4.0)
    rules = {"softcap": softcap, "logit_scale": 1.5, "temperature": 0.5}
    (_, exact), (out, gradients) = run(tensors, **rules), run(tensors, mode="sparse", **rules)
    assert out.support is not None and int(out.support.columns) < 999
    for actual, expected in zip(gradients, exact, strict=True):
        assert float((actual - expected).norm()) < 1e-3 * float(expected.norm())


def test_exact_values_on_request(case: Any) -> None:
    tensors = peaked(case, 100, 5003, "gaussian", 30.0)
    with torch.no_grad():
        tensors.student_hidden[[3, 50, 77]] *= 0.001  # flat rows, which take the dense path
    rules: dict[str, Any] = {"token_ids": tensors.token_ids, "temperature": 0.8, "chunk_size": 60}
    rules["token_weights"] = tensors.token_weights.masked_fill(tensors.token_ids % 4 == 0, 0)
    rules["allowed_columns"] = tensors.allowed_columns
    of_sparse = {"mode": "sparse", "tolerance": 1e-2}
    bound, bound_gradients = run(tensors, **rules, **of_sparse)
    exact, gradients = run(tensors, **rules, **of_sparse, exact_value=True)
    fast, _ = run(tensors, **rules)
    assert exact.support is not None and 0 < int(exact.support.dense_rows.sum()) < 90
    for name in ("loss", "token_kl", "student_entropy", "teacher_entropy", "student_logprobs"):
        assert_close(getattr(exact, name), getattr(fast, name))
    assert (bound.token_kl <= fast.token_kl + 1e-12).all()
    assert float(bound.loss) < float(fast.loss) - 1e-4
    assert all(torch.equal(*pair) for pair in zip(gradients, bound_gradients, strict=True))


def test_no_tolerance_is_fast(case: Any) -> None:
    tensors = peaked(case, 13, 999, "gaussian", 3.0)
    (dense, exact), (out, gradients) = run(tensors), run(tensors, mode="sparse", tolerance=0.0)
    assert out.support is None and torch.equal(out.loss, dense.loss)
    assert all(map(torch.equal, gradients, exact))


def test_a_flat_chunk_takes_the_dense_path(case: Any) -> None:
    """Of two chunks, the second is flat: its gradients are the exact ones."""
    tensors = peaked(case, 20, 999, "gaussian", 20.0)
    with torch.no_grad():
        tensors.student_hidden[10:] *= 0.01
    _, exact = run(tensors)
    out, gradients = run(tensors, mode="sparse", tolerance=1e-3, chunk_size=10)
    assert out.support is not None
    assert 0 < int(out.support.columns[0]) < 400 and int(out.support.columns[1]) == 0
    assert out.support.dense_rows.tolist() == [0, 10]
    assert_close(gradients[0][10:], exact[0][10:], rtol=1e-12, atol=1e-12)
    assert not torch.equal(gradients[0][:10], exact[0][:10])
    assert bool((out.support.left_out[10:] == 0).all())
    error = float((gradients[1] - exact[1]).norm()) / float(exact[1].norm())
    assert 0 < error < 5e-3


@pytest.mark.parametrize("capacity", [1, 64, 998, 5000])
def test_a_capacity_takes_the_likeliest_columns(case: Any, capacity: int) -> None:
    """As on a GPU, whatever they leave out; the bound still holds."""
    tensors = peaked(case, 9, 999, "zipf", 3.0)
    out, gradients = run(tensors, mode="sparse", capacity=capacity)
    dense, exact = run(tensors)
    support = out.support
    assert support is not None and int(support.columns) == min(capacity, 999)
    bound, largest = support.gradient_bound, tensors.student_lm_head.detach().norm(dim=1).amax()
    assert bool(((gradients[0] - exact[0]).norm(dim=1) <= bound * largest + 1e-12).all())
    probs = reference.log_probs(tensors.student_hidden, tensors.student_lm_head).exp()
    assert probs.shape == (9, 999)
    if capacity == 5000:
        assert_close(out.token_kl, dense.token_kl, rtol=1e-9, atol=1e-12)
        assert_close(gradients[1], exact[1], rtol=1e-9, atol=1e-12)
    if capacity == 1:
        assert float(support.left_out.max()) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(case: Any, dtype: torch.dtype) -> None:
    tensors = case.build(num_rows=32, vocab=999, logit_std=12.0, dtype=dtype)
    (_, exact), (out, gradients) = run(tensors), run(tensors, mode="sparse")
    assert out.loss.dtype == torch.float32 and gradients[1].dtype == dtype
    for actual, expected in zip(gradients, exact, strict=True):
        limit = 1e-3 if dtype == torch.float32 else 2e-2
        assert float((actual - expected).norm()) < limit * float(expected.norm())


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(case: Any, num_rows: int) -> None:
    out, gradients = run(peaked(case, num_rows, 999, "zipf", 3.0), mode="sparse")
    assert out.support is not None and out.support.left_out.shape == (num_rows,)
    assert len(out.support.columns) == num_rows and gradients[1].shape == (999, 16)
    assert num_rows or not gradients[1].any()


def test_every_row_of_weight_0(case: Any) -> None:
    tensors = peaked(case, 5, 999, "zipf", 3.0)
    weights = torch.zeros(5, dtype=torch.float64)
    out, gradients = run(tensors, mode="sparse", token_weights=weights)
    assert float(out.loss) == 0 and not any(bool(gradient.any()) for gradient in gradients)


def test_a_frozen_head(case: Any) -> None:
    tensors = peaked(case, 9, 999, "gaussian", 20.0)
    head = tensors.student_lm_head.detach()
    sides = tensors.teacher_hidden, tensors.teacher_lm_head
    out = linear_reverse_kl(tensors.student_hidden, head, *sides, mode="sparse")
    (actual,) = torch.autograd.grad(out.loss, tensors.student_hidden)
    _, (expected, _) = run(tensors, mode="sparse")
    assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_the_largest_row_is_looked_up_again_when_the_head_changes(case: Any) -> None:
    tensors = peaked(case, 9, 999, "gaussian", 10.0)
    before, _ = run(tensors, mode="sparse", capacity=50)
    with torch.no_grad():
        tensors.teacher_lm_head.mul_(3.0)
    after, _ = run(tensors, mode="sparse", capacity=50)
    assert before.support is not None and after.support is not None
    assert bool((after.support.gradient_bound > before.support.gradient_bound).all())


def test_compiled_code_runs_it_too(case: Any) -> None:
    tensors = peaked(case, 9, 999, "gaussian", 20.0)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        sides = tensors.teacher_hidden, tensors.teacher_lm_head
        return linear_reverse_kl(2 * hidden, head, *sides, mode="sparse").loss

    leaves = tensors.student_hidden, tensors.student_lm_head
    eager = loss(*leaves)
    compiled = torch.compile(loss, backend="aot_eager")(*leaves)
    assert_close(compiled, eager)
    for one, other in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 1.0}, r"^tolerance is 1\.0, expected a number in \[0, 1\)"),
        ({"tolerance": -0.1}, r"^tolerance is -0\.1"),
        ({"tolerance": float("nan")}, r"^tolerance is nan"),
        ({"capacity": 0}, r"^capacity is 0, expected None or an integer >= 1"),
        ({"beta": 0.5}, r"^mode is 'sparse', expected beta 1"),
        ({"reduction": "none"}, r"^mode is 'sparse', expected beta 1, reduction 'sum'"),
        ({"estimator": "sampled"}, r"expected"),
    ],
)
def test_what_it_does_not_do_is_named(case: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case.build(), mode="sparse", **options)
