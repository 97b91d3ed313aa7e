"""A distillation loop written against Liger-Kernel: its two losses, and their replacements.

`LigerFusedLinearJSDLoss` is plain torch, `LigerFusedLinearJSD` is a Triton kernel and needs a GPU.
The replacements of both run on either.
"""

from collections.abc import Callable

import torch
from torch import nn

from bench.examples.compare import Example
from bench.examples.task import LEARNING_RATE, Task


def train(task: Task, make_loss: Callable[[], nn.Module]) -> list[float]:
    """The losses of all steps. This loop is the caller of either loss and does not change."""
    student, teacher, loss_function = task.student, task.teacher, make_loss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    losses = []
    for input_ids, completion_mask in task.batches():
        student_hidden = student.model(input_ids).last_hidden_state[:, :-1]
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids).last_hidden_state[:, :-1]
        labels = input_ids.masked_fill(~completion_mask, -100)[:, 1:]
        loss = loss_function(
            student_hidden.flatten(0, 1),
            student.lm_head.weight,
            teacher_hidden.flatten(0, 1),
            teacher.lm_head.weight,
            labels.flatten(),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def chunked_with_liger() -> nn.Module:
    """Before: Liger's loss in plain torch, cross-entropy and JSD."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.3, weight_soft_loss=0.7, temperature=2.0)


def chunked_with_fused_kl() -> nn.Module:
    """After: its replacement."""
    from fused_kl.adapters import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.3, weight_soft_loss=0.7, temperature=2.0)


def fused_with_liger() -> nn.Module:
    """Before: Liger's loss in Triton, the JSD alone."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5, temperature=2.0)


def fused_with_fused_kl() -> nn.Module:
    """After: its replacement."""
    from fused_kl.adapters import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5, temperature=2.0)


EXAMPLE = Example(before=chunked_with_liger, after=chunked_with_fused_kl, train=train)
FUSED = Example(before=fused_with_liger, after=fused_with_fused_kl, train=train)
