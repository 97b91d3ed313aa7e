"""Prompts from examples: decoded frames, token ids, positions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd.config.data import RECIPES, DataConfig
from opd.data.batch import Prompt
from opd.data.examples import Example
from opd.data.video.budget import Budget, budget_of, recipe_of
from opd.data.video.decoding import TEMPORAL_PATCH
from opd.data.video.frames import Frames
from opd.data.video.sampling import VideoFrames
from opd.errors import DataError, require
from opd.text.templates import load_template

VIDEO_END = "<|vision_end|>"  # of both families' templates and tokenizers


class Prompts:
    """Makes prompts from examples: decode, then the checkpoint's own processor.

    Up to `cache_mb` it keeps what can be used again: prompts with their vision tokens for models
    whose tower is frozen, decoded frames for others.
    """

    def __init__(
        self, examples: Sequence[Example], config: DataConfig, processor: Any, lm: Any
    ) -> None:
        self.examples, self.config, self.processor, self.lm = examples, config, processor, lm
        self.template = load_template(config.prompt)
        self.tokenizer = processor.tokenizer
        self.end_token = self.tokenizer.eos_token
        # Qwen2.5-VL's budget, if it is ours, depends on the number of frames.
        known = lm.family == "qwen3_vl" or config.video_tokens is None
        if config.recipe is not None:
            family = RECIPES[config.recipe][0]
            told = f"data.recipe={config.recipe}: is of {family}, the student is {lm.family}"
            require(family == lm.family, told)
        recipe = recipe_of(config, lm.family)
        self._source = Frames(config, recipe or (self._budget(2) if known else None))
        self._frames: dict[Path, VideoFrames] = {}
        self._kept: dict[int, Prompt] = {}
        self._features: dict[Path, dict[Any, Any]] = {}  # of a video, whatever is asked of it
        self.broken: dict[int, str] = {}  # why, of the examples whose video does not decode
        self._free = config.cache_mb * 2**20
        self._last: dict[str, Any] | None = None  # the video that was processed last

    def __len__(self) -> int:
        return len(self.examples)

    def frames(self, index: int, keep: bool = True) -> VideoFrames:
        """The sampled frames of one example's video."""
        video = self.examples[index].video
        if video in self._frames:
            return self._frames[video]
        decoded = self._source.get(video)
        if keep and decoded.frames.nbytes <= self._free:
            self._free -= decoded.frames.nbytes
            self._frames[video] = decoded
        return decoded

    def text(self, example: Example) -> str:
        """The prompt as the chat template writes it, up to where the assistant speaks."""
        before, after = self.template.turn(
            example.question or example.query,
            example.options,
            grounded=bool(example.question and example.spans),
            question=example.question is not None,
            duration_s=example.duration_s,
        )
        content = [
            {"type": "text", "text": before},
            {"type": "video"},
            {"type": "text", "text": after},
        ]
        content = [c for c in content if c.get("text") != ""]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def __getitem__(self, index: int) -> Prompt:
        return self._make(index, keep_frames=True)

    def usable(self, index: int, models: Sequence[Any]) -> Prompt | None:
        """`seen_by`; None, with the reason in `broken`, where the video does not decode."""
        if index not in self.broken:
            try:
                return self.seen_by(index, models)
            except DataError as error:
                self.broken[index] = f"{self.examples[index].source}: {error}"
        return None

    def seen_by(self, index: int, models: Sequence[Any]) -> Prompt:
        """The prompt as these models (`VideoLM`) need it. Where all of their towers are frozen (and
        not sharded: all ranks must forward as often): without frames if they have seen it before
        and there was room to keep what they made."""
        if not _share(models):
            return self[index]
        kept = self._seen(index, models)
        if kept is not None:
            return kept
        made = self._make(index, keep_frames=False)
        features = self._features.setdefault(made.example.video, {})
        for model in models:
            size = model.video_bytes(made.grid_thw)
            if model not in features and size <= self._free:
                self._free -= size
                features[model] = None
        made = replace(made, features=features)
        if features:
            self._kept[index] = replace(made, pixel_values=None)
        return made

    def _seen(self, index: int, models: Sequence[Any]) -> Prompt | None:
        """The prompt without frames, where it is kept with what all these models made of them."""
        kept = self._kept.get(index)
        made = kept is not None and all(kept.features.get(m) is not None for m in models)
        return kept if made else None

    def side_by_side(self, prompts: Sequence[Prompt], models: Sequence[Any]) -> list[Prompt]:
        """Prompts of one batch, those of one length beside each other; of one video, too, where
        they share a prefix. Where all towers are frozen, its frames come with the first alone, and
        what a tower makes of them serves the others."""
        videos = {prompt.example.video: i for i, prompt in enumerate(prompts)}
        if len(videos) == len(prompts):
            return sorted(prompts, key=lambda prompt: len(prompt.input_ids))
        found = sorted(
            prompts,
            key=lambda p: (self.template.video_first and videos[p.example.video], len(p.input_ids)),
        )
        if not _share(models):
            return found
        first: dict[Path, Prompt] = {}
        for place, prompt in enumerate(found):
            before = first.get(prompt.example.video)
            if before is not None:
                found[place] = replace(prompt, features=before.features, pixel_values=None)
                continue
            if any(model not in prompt.features for model in models):  # no room to keep
                found[place] = replace(prompt, features=dict.fromkeys(models) | prompt.features)
            first[prompt.example.video] = found[place]
        return found

    def _budget(self, frames: int) -> Budget:
        """What the video processor is told of sizes, for a video of so many frames."""
        return budget_of(self.config, self.processor.video_processor, self.lm.family, frames)

    def expect(self, indices: Sequence[int], models: Sequence[Any]) -> None:
        """Let the videos of these examples be decoded ahead, unless they are not needed."""
        wanted = []
        for index in indices:
            video = self.examples[index].video
            if (
                self._seen(index, models) is None
                and index not in self.broken
                and video not in self._frames
            ):
                wanted.append(video)
        self._source.expect(wanted)

    def _processed(self, index: int, keep_frames: bool) -> dict[str, Any]:
        """What the checkpoint's processor makes of an example. Its video and the text before it are
        not processed again for the next query about it: no token spans the end of a video."""
        example = self.examples[index]
        head, _, tail = self.text(example).rpartition(VIDEO_END)
        made = self._last
        if made is None or (made["video"], made["head"]) != (example.video, head):
            decoded = self.frames(index, keep_frames)
            asked = self._budget(len(decoded.frames)).options
            known = self.processor.video_processor
            budget = {key: value for key, value in asked.items() if hasattr(known, key)}
            inputs = self.processor(
                text=[head + VIDEO_END],
                videos=[decoded.frames],
                video_metadata=[decoded.metadata()],
                do_sample_frames=False,
                return_tensors="pt",
                **budget,
            )
            made = {"video": example.video, "head": head, "decoded": decoded, "inputs": inputs}
            self._last = made
        rest = torch.tensor(self.tokenizer(tail).input_ids, dtype=torch.long)
        ids = torch.cat([made["inputs"]["input_ids"][0], rest])
        return {**made["inputs"], "input_ids": ids, "decoded": made["decoded"]}

    def _make(self, index: int, keep_frames: bool) -> Prompt:
        example, inputs = self.examples[index], self._processed(index, keep_frames)
        ids, decoded = inputs["input_ids"], inputs["decoded"]
        frames, rows, columns = inputs["video_grid_thw"][0].tolist()
        grid = (frames, rows, columns)
        times = decoded.times_s
        spacing = (times[-1] - times[0]) / max(1, len(times) - 1)
        positions, next_position = self.lm.positions(ids, grid, TEMPORAL_PATCH * spacing)
        answer = self.template.reference(example.spans, example.answer, example.options)
        completion = self.tokenizer(answer + self.end_token).input_ids if answer else []
        return Prompt(
            example=example,
            input_ids=ids,
            position_ids=positions,
            next_position=next_position,
            pixel_values=inputs["pixel_values_videos"],
            grid_thw=grid,
            frame_indices=tuple(decoded.indices),
            timestamps_s=tuple(decoded.timestamps_s),
            completion_ids=torch.tensor(completion, dtype=torch.long),
        )


def _share(models: Sequence[Any]) -> bool:
    """Whether what these models' towers make of a video serves whoever asks about it: all are
    frozen, and none is sharded, which all ranks must forward as often."""
    return bool(models) and not any(model.trains_vision or model.sharded for model in models)
