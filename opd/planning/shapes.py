"""Models on the meta device, and the memory that a training step of them takes.

A step runs the trainer's own functions (`prefill`, `Decoder`, `extend`, backward) on meta tensors.
`Live` counts the live tensors and their peak in each moment of the step. Attention, vision tower
and loss are stand-ins that allocate what the real ones allocate.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers import AutoModelForImageTextToText as AutoModel
from transformers.masking_utils import sdpa_mask

from opd.config.run import Config
from opd.data.batch import Group, PromptBatch
from opd.generation.decoder import Decoder
from opd.generation.extend import extend
from opd.generation.policy import Policy, choose
from opd.generation.prefix import Prefix, prefill
from opd.generation.sampling import KEEP_BELOW
from opd.models import tiny
from opd.models.load import prepare, resolve
from opd.models.video_lm import Video, VideoLM
from opd.planning.live import (
    FusedLoss,
    Live,
    stand_in_attention,
    stand_in_vision_attention,
)

MOMENTS = {  # of a step, and how messages refer to them
    "vision": "in the student's vision tower",
    "prefill": "in the prompts' forward",
    "sample": "while sampling",
    "teacher": "while the teacher scores",
    "extend": "in the completions' forward",
    "loss": "in the loss",
    "backward": "in backward",
    "optimizer": "in the optimizer's update",
}
ATTENTION = "opd-shapes"


@dataclass(frozen=True)
class Size:
    """Numbers of weights of a model."""

    language: int  # layers, embedding and norm
    head: int  # 0 where it is tied to the embedding
    vision: int
    trained: int
    layer: int  # the largest layer

    @property
    def total(self) -> int:
        return self.language + self.head + self.vision


def on_meta(spec: str, dtype: torch.dtype) -> VideoLM:
    """Build the model of a spec on the meta device: shapes without weights."""
    with torch.device("meta"):
        if spec.startswith("tiny:"):
            model = tiny.build(spec.removeprefix("tiny:"), 0)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(resolve(spec)), dtype=dtype)
        lm = prepare(model.to(dtype))
    AttentionInterface.register(ATTENTION, stand_in_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    for block in lm.visual.blocks:
        block.attn.forward = partial(stand_in_vision_attention, block.attn)
    return lm


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def size_of(lm: VideoLM) -> Size:
    """Count the weights of a model."""
    tied = lm.head.weight is lm.language_model.embed_tokens.weight
    return Size(
        language=_count(lm.language_model.parameters()),
        head=0 if tied else lm.head.weight.numel(),
        vision=_count(lm.visual.parameters()),
        trained=_count(p for p in lm.model.parameters() if p.requires_grad),
        layer=max(_count(layer.parameters()) for layer in lm.language_model.layers),
    )


def pixel_bytes(lm: VideoLM, video_tokens: int) -> int:
    """Bytes of one video's patches in the dtype of the vision tower."""
    config = lm.model.config.vision_config
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = video_tokens * config.spatial_merge_size**2
    return patches * patch * lm.head.weight.element_size()


def see(lm: VideoLM, live: Live, video_tokens: int) -> Video:
    """Run one video through the vision tower, as `encode` does."""
    visual, config = lm.visual, lm.model.config.vision_config
    patches = video_tokens * config.spatial_merge_size**2
    dtype = lm.head.weight.dtype
    with live.label("pixels"):
        size = pixel_bytes(lm, video_tokens) // dtype.itemsize // patches
        pixels = torch.empty(patches, size, dtype=dtype, device="meta")
    levels, chosen = [], list(getattr(config, "deepstack_visual_indexes", ()))
    with torch.set_grad_enabled(lm.trains_vision and torch.is_grad_enabled()):
        hidden = visual.patch_embed(pixels)
        hidden = hidden + torch.empty_like(hidden)  # positions
        dim = config.hidden_size // config.num_heads
        angles = [torch.empty(patches, dim, device="meta") for _ in range(2)]
        for index, block in enumerate(visual.blocks):
            hidden = block(hidden, cu_seqlens=None, position_embeddings=tuple(angles))
            if index in chosen:
                levels.append(visual.deepstack_merger_list[chosen.index(index)](hidden))
        return visual.merger(hidden), levels


@dataclass(frozen=True)
class _Shape:
    """Stand-in for a `Prompt`, with its tokens on the host."""

    input_ids: torch.Tensor
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a rank in a micro-batch of a step."""

    device_type: str  # cpu or cuda
    prompts: int
    tokens: int  # of a prompt
    video_tokens: int  # of them
    queries_per_video: int  # prompts that share all tokens but `own_tokens`
    own_tokens: int
    rollouts: int
    length: int  # of a completion
    sampled: bool  # completions are sampled, not reference answers
    losses: tuple[int, ...]  # for each loss, the number of heads whose logits it needs
    several: bool  # a step has more than one micro-batch
    fp32_gradients: bool  # each gradient is copied to fp32 when it is complete
    kept_gradients: bool  # they stay: there are none of an earlier micro-batch to add them to
    together: int = 1  # micro-batches that are sampled together

    @classmethod
    def of(cls, config: Config, wide: bool, several: bool, **sizes: Any) -> "Work":
        """Work under a configuration; `wide` says that weights are fp32 already, `sizes` are the
        fields that do not follow from it."""
        torch_engine = config.engine.kind == "torch"
        losses = (2,) if config.method == "opd" and config.objective != "constant" else (1,)
        return cls(
            queries_per_video=config.data.queries_per_video or 1,
            rollouts=config.num_rollouts,
            length=max(2, config.sampled_length),
            sampled=not config.on_references,
            losses=(*losses, 1) if config.opd.reward_coef else losses,
            several=several,
            fp32_gradients=torch_engine and not wide,
            kept_gradients=torch_engine and not several,
            **sizes,
        )

    @property
    def completion_tokens(self) -> int:
        """Tokens of all completions, padding included."""
        return self.prompts * self.rollouts * self.length


def prompts_of(
    lm: VideoLM, work: Work, grid_thw: tuple[int, int, int] = (1, 2, 2)
) -> list[PromptBatch]:
    """The prompts by video: prompts rarely have the same length, so each group of queries about a
    video is a part of its own."""
    meta: dict[str, Any] = {"device": "meta"}
    ids = torch.zeros(work.tokens, dtype=torch.long)
    ids[: work.video_tokens] = lm.model.config.video_token_id
    parts = []
    for first in range(0, work.prompts, work.queries_per_video):
        count = min(work.queries_per_video, work.prompts - first)
        shared = work.tokens - work.own_tokens * (count > 1)
        group = Group((_Shape(ids, grid_thw),) * count, shared)  # type: ignore[arg-type]
        length = group.num_tokens
        part = PromptBatch(
            groups=(group,),
            input_ids=torch.empty(1, length, dtype=torch.long, **meta),
            mask=torch.empty(count, length, dtype=torch.bool, **meta),
            position_ids=torch.empty(3, 1, length, dtype=torch.long, **meta),
            next_position=torch.empty(count, dtype=torch.long, **meta),
            pixel_values=torch.empty(0, **meta),
            video_grid_thw=torch.empty(1, 3, dtype=torch.long, **meta),
        )
        parts.append(part)
    return parts


def completions(work: Work) -> torch.Tensor:
    """Token ids `[B, R, T]`."""
    size = work.prompts, work.rollouts, work.length
    return torch.empty(size, dtype=torch.long, device="meta")


def rows_of(hidden: torch.Tensor) -> torch.Tensor:
    """Select the tokens in the loss, here all: `[B, R, T, H]` become `[N, H]`."""
    flat = hidden.flatten(0, 2)
    return flat.index_select(0, torch.empty(len(flat), dtype=torch.long, device="meta"))


@contextmanager
def taken_gradients(lm: VideoLM, live: Live, work: Work) -> Iterator[None]:
    """Context in which a weight's complete gradient is moved to where the engine keeps it."""
    kept = []

    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float() if work.fp32_gradients else parameter.grad
        parameter.grad = None
        if work.kept_gradients:
            live.rename(gradient, "gradients (fp32)")
            kept.append(gradient)

    hooks = [
        parameter.register_post_accumulate_grad_hook(take)
        for parameter in lm.model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sample_once(lm: VideoLM, live: Live, work: Work, prefix: Prefix) -> None:
    """Sample the last token of a completion, when the cache is full, as `sample` does. Before it,
    as many completions have ended as copies most of the others' caches."""
    with live.label("decode cache"):
        decoder = Decoder(lm, prefix, work.rollouts, work.length - 1)
        if decoder.is_long and (groups := int(KEEP_BELOW * len(prefix.counts))):
            kept, branches = (torch.arange(n, device="meta") for n in (groups, decoder.branches))
            decoder.keep(kept, branches.expand(groups, -1), work.length - 2)
    hidden = prefix.last_hidden[:, None].expand(-1, work.rollouts, -1)
    if work.length > 1:
        token_ids = torch.empty(decoder.next_position.shape, dtype=torch.long, device="meta")
        decoder.step(token_ids, decoder.max_steps)
    allowed = torch.empty(len(lm.head.weight), dtype=torch.bool, device="meta")
    with live.label("logits"):
        log_probs = Policy(allowed, 1.0, (0,), 0).log_probs(lm.head(hidden))
        choose(log_probs, torch.empty(hidden.shape[:2], dtype=torch.float64, device="meta"))


def student_step(lm: VideoLM, work: Work, recompute: str) -> dict[str, dict[str, int]]:
    """Bytes of the student's live tensors, by label, at the peak of each moment of a micro-batch.
    Weights are left out; `teacher` has what the student keeps while the teacher scores."""
    live = Live(lm.model.parameters(), work.device_type)
    with torch.enable_grad(), live:
        waiting: list[Prefix] = []  # of the micro-batches that are learned from later
        for _ in range(work.together):
            with live.moment("vision", "vision tower's activations, tokens"):
                parts = prompts_of(lm, work)
                videos = [see(lm, live, work.video_tokens) for _ in parts]
            with live.moment("prefill", "prompts' activations"):
                pairs = zip(parts, videos, strict=True)
                prefixes = [prefill(lm, part, video, recompute) for part, video in pairs]
            waiting += prefixes
        prefix = None
        if work.sampled:
            with live.moment("sample", "decode step"), torch.no_grad():
                prefix = Prefix.join([part.detach() for part in waiting], by_layer=True)
                sample_once(lm, live, work, prefix)
        with live.moment("teacher"):
            pass
        with live.moment("extend", "completions' activations"):
            prefix = Prefix.join(prefixes)
            hidden = rows_of(extend(lm, prefix, completions(work), recompute=recompute))
        with live.moment("loss", "loss, without logits"):
            loss = torch.zeros((), device="meta")
            for heads in work.losses:
                loss = loss + FusedLoss.apply(hidden, lm.head.weight, heads)
        if loss.requires_grad:
            with live.moment("backward", "backward of a layer"), taken_gradients(lm, live, work):
                loss.backward()
    return live.peaks


def teacher_step(lm: VideoLM, work: Work) -> dict[str, int]:
    """Bytes of the teacher's live tensors at their peak, by label; weights are left out."""
    live = Live(lm.model.parameters(), work.device_type)
    with torch.no_grad(), live, live.moment("teacher", "activations, cache"):
        prefix = Prefix.join(
            [prefill(lm, part, see(lm, live, work.video_tokens)) for part in prompts_of(lm, work)]
        )
        rows_of(extend(lm, prefix, completions(work)))
    return live.peaks["teacher"]
