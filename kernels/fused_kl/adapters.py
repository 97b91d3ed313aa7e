"""Drop-in replacements for three public losses, with their call signatures: change the import.

    LigerFusedLinearJSD         liger_kernel.transformers.LigerFusedLinearJSD
    LigerFusedLinearJSDLoss     liger_kernel.chunked_loss.LigerFusedLinearJSDLoss
    chunked_divergence_loss     trl.trainer.distillation_trainer._chunked_divergence_loss

Logits and their gradients are fp32, so that values differ from Liger's by the rounding of its bf16
logits. Each loss allows one backward, because its gradients are computed in forward. Vocabularies
of different sizes are cut to the smaller, whereas Liger pads the student's logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fused_kl.linear import linear_reverse_kl
from fused_kl.policy import linear_cross_entropy


def _whole(weight: Tensor | None, hidden: Tensor) -> Any:
    """A weight that FSDP2 shards (a DTensor), gathered and in the dtype of the hidden states; any
    other as it is."""
    return weight.full_tensor().to(hidden.dtype) if isinstance(weight, DTensor) else weight


def _mean_weights(labels: Tensor | None, hidden: Tensor, ignore_index: int) -> Tensor:
    """1 / number of valid tokens at these, 0 elsewhere, without waiting for the device."""
    if labels is None:
        return hidden.new_full((len(hidden),), 1 / max(1, len(hidden)), dtype=torch.float32)
    valid = labels != ignore_index
    return valid.float() / valid.sum().clamp_min(1)


class LigerFusedLinearJSD(nn.Module):
    """Mean generalised JSD over tokens whose label is not `ignore_index`.

    `accum_dtype` is accepted and has no effect: sums are always fp32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """`[BT, H]`, `[V, H]`, `[BT, H']`, `[V, H']`, `[BT]` -> scalar."""
        return linear_reverse_kl(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            token_weights=_mean_weights(shift_labels, student_input, self.ignore_index),
            temperature=self.temperature,
            beta=self.jsd_beta,
        ).loss


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE(labels) + weight_soft_loss JSD, both means over valid tokens.

    The cross-entropy is taken at temperature 1, the JSD at `temperature`. `compiled` and
    `chunk_size` are accepted and have no effect: chunk sizes follow a memory budget.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """Scalar, or (loss, soft, hard) with `return_soft_hard_loss`."""
        weights = _mean_weights(true_labels, student_input, self.ignore_index)
        soft = linear_reverse_kl(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            token_weights=weights,
            temperature=self.temperature,
            beta=self.beta,
            student_bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        ).loss
        loss, hard = self.weight_soft_loss * soft, soft.new_zeros(())
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            hard = linear_cross_entropy(
                student_input, student_weight, true_labels, token_weights=weights, bias=student_bias
            ).loss
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sum of the student's entropies and number of valid tokens, from hidden states
    `[B, K, H]` and a mask `[B, K]`.

    The loss is the mean over valid tokens, or the sum divided by `num_items_in_batch`. Weights that
    FSDP2 shards are gathered first, as in TRL. Under ZeRO-3 an untied head must be gathered around
    the call (`deepspeed.zero.GatheredParameters`), which TRL does inside of its own loss.
    """
    valid = completion_mask.reshape(-1) != 0
    # Only valid tokens are projected, as in TRL; on a GPU the host waits for their number.
    student_hidden, teacher_hidden = (
        states.reshape(-1, states.shape[-1])[valid]
        for states in (student_hidden_states, teacher_hidden_states.detach())
    )
    student_weights = student_lm_head_weight, student_lm_head_bias
    student_head, student_bias = (_whole(weight, student_hidden) for weight in student_weights)
    teacher_weights = teacher_lm_head_weight, teacher_lm_head_bias
    teacher_head, teacher_bias = (_whole(weight, teacher_hidden) for weight in teacher_weights)
    num_valid = valid.sum()
    count = num_valid.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    out = linear_reverse_kl(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head.detach(),
        temperature=temperature,
        beta=beta,
        student_bias=student_bias,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        softcap=(student_final_logit_softcapping, teacher_final_logit_softcapping),
        logit_scale=(student_logit_scale, teacher_logit_scale),
    )
    return out.loss / count, out.student_entropy.sum(), num_valid
