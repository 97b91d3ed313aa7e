"""A distillation loop in plain PyTorch: the reverse KL of dense logits, and `linear_reverse_kl`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from bench.examples.compare import Example
from bench.examples.task import LEARNING_RATE, Task

Loss = Callable[[Qwen3ForCausalLM, Qwen3ForCausalLM, Tensor, Tensor], Tensor]


def train(task: Task, loss_of: Loss) -> list[float]:
    """The losses of all steps."""
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=LEARNING_RATE)
    losses = []
    for input_ids, completion_mask in task.batches():
        loss = loss_of(task.student, task.teacher, input_ids, completion_mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_logits(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, input_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """Before: the mean over completion tokens of the reverse KL, from both models' logits."""
    student_logits = student(input_ids).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = teacher(input_ids).logits[:, :-1]
    student_logprobs = F.log_softmax(student_logits, dim=-1)
    teacher_logprobs = F.log_softmax(teacher_logits, dim=-1)
    divergence = F.kl_div(teacher_logprobs, student_logprobs, reduction="none", log_target=True)
    mask = completion_mask[:, 1:]
    return (divergence.sum(dim=-1) * mask).sum() / mask.sum()


def with_fused_kl(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, input_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """After: the same, from both models' hidden states."""
    from fused_kl import linear_reverse_kl

    student_hidden = student.model(input_ids).last_hidden_state[:, :-1]
    with torch.no_grad():
        teacher_hidden = teacher.model(input_ids).last_hidden_state[:, :-1]
    mask = completion_mask[:, 1:]
    return linear_reverse_kl(
        student_hidden.flatten(0, 1),
        student.lm_head.weight,
        teacher_hidden.flatten(0, 1),
        teacher.lm_head.weight,
        token_weights=(mask / mask.sum()).flatten(),
    ).loss


EXAMPLE = Example(before=with_logits, after=with_fused_kl, train=train)
