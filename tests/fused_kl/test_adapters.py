"""Modules and adapters: the same values and gradients as the functions and the libraries they stand
in for."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fused_kl
from fused_kl import adapters, modules, reference

IGNORED = -100


def sides(tensors):
    return (
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )


def labels_of(tensors):
    labels = tensors.token_ids.clone()
    labels[[1, 5]] = IGNORED
    return labels


def assert_same_gradients(actual, truth, leaves, error=1e-5):
    pair = (torch.autograd.grad(loss, leaves) for loss in (actual, truth))
    for a, b in zip(*pair, strict=True):
        assert (a - b).norm() <= error * b.norm()


def test_modules_are_their_functions(case):
    tensors = case.build()
    ids, weights = tensors.token_ids, tensors.token_weights
    policy = dict(clip=0.2, entropy_coef=0.1)
    pairs = [
        (modules.LinearReverseKL(beta=0.4), fused_kl.linear_reverse_kl, dict(beta=0.4), sides),
        (
            modules.TopKReverseKL(k=9, tail=True),
            fused_kl.topk_reverse_kl,
            dict(k=9, tail=True),
            sides,
        ),
        (modules.LinearCrossEntropy(), fused_kl.linear_cross_entropy, {}, None),
        (modules.LinearPolicyLoss(**policy), fused_kl.linear_policy_loss, policy, None),
    ]
    for module, function, options, wants in pairs:
        assert isinstance(module, nn.Module)
        arguments = wants(tensors) if wants else (*sides(tensors)[:2], ids)
        given = {"token_weights": weights}
        if function is fused_kl.linear_policy_loss:
            given["advantages"] = tensors.advantages
        actual, truth = module(*arguments, **given), function(*arguments, **options, **given)
        assert torch.equal(actual.loss, truth.loss)
        assert_same_gradients(actual.loss, truth.loss, sides(tensors)[:2], 0)
        assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())


def dense_jsd(tensors, beta, temperature, kept):
    loss, *_ = reference.linear_reverse_kl(
        *sides(tensors), beta=beta, temperature=temperature, token_weights=kept.double()
    )
    return loss / kept.sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_labels", [True, False])
def test_liger_fused(case, beta, with_labels):
    tensors = case.build()
    labels = labels_of(tensors) if with_labels else None
    kept = torch.ones(13, dtype=torch.bool) if labels is None else labels != IGNORED
    module = adapters.LigerFusedLinearJSD(jsd_beta=beta, temperature=1.4)
    actual = module(*sides(tensors), labels)
    truth = dense_jsd(tensors, beta, 1.4, kept)
    assert_close(actual, truth)
    assert_same_gradients(actual, truth, sides(tensors)[:2])


def test_liger_chunked(case):
    tensors = case.build(bias=True)
    labels = labels_of(tensors)
    kept = labels != IGNORED
    module = adapters.LigerFusedLinearJSDLoss(0.3, 0.7, 0.4, IGNORED, 1.4, False, 4, True)
    actual, soft, hard = module(*sides(tensors), labels, tensors.student_bias, tensors.teacher_bias)
    exact, *_ = reference.linear_reverse_kl(
        *sides(tensors),
        beta=0.4,
        temperature=1.4,
        token_weights=kept.double(),
        student_bias=tensors.student_bias,
        teacher_bias=tensors.teacher_bias,
    )
    exact = exact / kept.sum()
    logits = tensors.student_hidden @ tensors.student_lm_head.T + tensors.student_bias
    entropy = nn.functional.cross_entropy(logits, labels)
    assert_close(soft, exact.detach())
    assert_close(hard, entropy.detach())
    truth = 0.3 * entropy + 0.7 * exact
    assert_close(actual, truth)
    assert_same_gradients(actual, truth, (*sides(tensors)[:2], tensors.student_bias))
    plain = adapters.LigerFusedLinearJSDLoss(0.0, 1.0, 0.4)
    assert_close(plain(*sides(tensors), labels), dense_jsd(tensors, 0.4, 1.0, kept))


@pytest.mark.parametrize("items", [None, 20, torch.tensor(20)])
def test_trl(case, items):
    tensors = case.build(num_rows=12)
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[0, 2:] = 0
    actual, entropy, valid = adapters.chunked_divergence_loss(
        tensors.student_hidden.view(3, 4, -1),
        tensors.teacher_hidden.view(3, 4, -1),
        tensors.student_lm_head,
        tensors.teacher_lm_head,
        mask,
        0.7,
        num_items_in_batch=items,
        temperature=0.8,
        student_logit_scale=1.5,
        teacher_logit_scale=0.5,
        student_final_logit_softcapping=20.0,
        teacher_final_logit_softcapping=30.0,
    )
    kept = mask.view(-1) != 0
    exact, _, student_entropy, _ = reference.linear_reverse_kl(
        *sides(tensors),
        beta=0.7,
        temperature=0.8,
        logit_scale=(1.5, 0.5),
        softcap=(20.0, 30.0),
        token_weights=kept.double(),
    )
    truth = exact / (10 if items is None else 20)
    assert valid == 10
    assert_close(actual, truth)
    assert_close(entropy, student_entropy.sum().detach())
    assert_same_gradients(actual, truth, sides(tensors)[:2])


# Against the libraries themselves, where they are installed.


def assert_callable_alike(ours, original):
    """Whoever calls the original may call ours: names, order and defaults."""
    mine = inspect.signature(ours).parameters
    for (name, parameter), other in zip(
        inspect.signature(original).parameters.items(), mine.values(), strict=True
    ):
        assert name == other.name
        assert parameter.default in (inspect.Parameter.empty, other.default)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD"),
        ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss"),
    ],
)
def test_liger_signatures(module, name):
    original = getattr(pytest.importorskip(module), name)
    ours = getattr(adapters, name)
    assert_callable_alike(ours.__init__, original.__init__)
    assert_callable_alike(ours.forward, original.forward)


def test_liger_values(case):
    original = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    tensors = case.build(dtype=torch.float32)
    arguments = (*sides(tensors), labels_of(tensors))
    options = (0.3, 0.7, 0.4, IGNORED, 1.4, False, 4)
    actual = adapters.LigerFusedLinearJSDLoss(*options)(*arguments)
    truth = original(*options)(*arguments)
    assert_close(actual, truth)
    assert_same_gradients(actual, truth, sides(tensors)[:2])


def test_trl_signature_and_values(case):
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    original = trainer._chunked_divergence_loss
    assert_callable_alike(adapters.chunked_divergence_loss, original)
    tensors = case.build(num_rows=12, dtype=torch.float32)
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[0, 2:] = 0
    arguments = (
        tensors.student_hidden.view(3, 4, -1),
        tensors.teacher_hidden.view(3, 4, -1),
        tensors.student_lm_head,
        tensors.teacher_lm_head,
        mask,
        0.7,
    )
    actual, truth = adapters.chunked_divergence_loss(*arguments), original(*arguments)
    for a, b in zip(actual, truth, strict=True):
        assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(actual[0], truth[0], sides(tensors)[:2])
