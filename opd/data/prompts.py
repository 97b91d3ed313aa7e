"""Making prompts from examples: their text, sampled frames, and the checkpoint's processor."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd import distributed
from opd.config.data import RECIPES, DataConfig
from opd.data.batch import Prompt
from opd.data.examples import Example
from opd.data.video.budget import Budget, budget_of, recipe_of
from opd.data.video.clips import Footage
from opd.data.video.decoding import TEMPORAL_PATCH
from opd.data.video.frames import Frames
from opd.data.video.sampling import VideoFrames
from opd.errors import DataError, require
from opd.text.templates import load_template

# In the chat templates and tokenizers of both families.
VIDEO_START, VIDEO_END = "<|vision_start|>", "<|vision_end|>"


class Prompts:
    """The prompts of a list of examples, made on demand.

    Up to `data.cache_mb` it keeps what later prompts can reuse: whole prompts with their vision
    tokens where the vision towers are frozen, else sampled frames.

    Attributes:
        broken: the reason, by index, for each example whose video turned out not to decode.
    """

    def __init__(
        self, examples: Sequence[Example], config: DataConfig, processor: Any, lm: Any
    ) -> None:
        """Prepare to make prompts; nothing is decoded yet.

        Args:
            processor: the checkpoint's processor, of transformers.
            lm: the student (`VideoLM`), whose family decides sizes and positions.

        Raises ConfigError where `data.recipe` is for another family, or the frame cache cannot be
        written.
        """
        self.examples, self.config, self.processor, self.lm = examples, config, processor, lm
        self.template = load_template(config.prompt)
        self.tokenizer = processor.tokenizer
        self.end_token = self.tokenizer.eos_token
        if config.recipe is not None:
            family = RECIPES[config.recipe][0]
            message = f"data.recipe={config.recipe}: is for {family}, the student is {lm.family}"
            require(family == lm.family, message)
        require(
            config.timestamps == "processor" or lm.family == "qwen2_5_vl",
            f"data.timestamps={config.timestamps}: is for qwen2_5_vl, the student is {lm.family}, "
            "whose processor writes them",
        )
        budget = recipe_of(config, lm.family)
        # Qwen2.5-VL's budget depends on the number of frames where data.video_tokens sets it.
        if budget is None and (lm.family == "qwen3_vl" or config.video_tokens is None):
            budget = self._budget(2)
        self._source = Frames(config, budget)
        self._frames: dict[Footage, VideoFrames] = {}
        self._kept: dict[int, Prompt] = {}
        self._features: dict[Footage, dict[Any, Any]] = {}  # shared by all prompts of a video
        self.broken: dict[int, str] = {}
        self._free = config.cache_mb * 2**20  # bytes
        self._last: dict[str, Any] | None = None  # the video that was processed last

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Prompt:
        """Return a prompt with its frames."""
        return self._make(index, keep_frames=True)

    def text(self, example: Example) -> str:
        """Return the prompt as the chat template writes it, up to the assistant's turn."""
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
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.template.system:
            text = [{"type": "text", "text": self.template.system}]
            messages.insert(0, {"role": "system", "content": text})
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def frames(self, index: int, keep: bool = True) -> VideoFrames:
        """Return the sampled frames of an example's video. Raises DataError if it does not decode.

        Args:
            keep: whether to keep them in memory for later calls, where there is room.
        """
        video = self.examples[index].footage
        if video in self._frames:
            return self._frames[video]
        decoded = self._source.get(video)
        if keep and decoded.frames.nbytes <= self._free:
            self._free -= decoded.frames.nbytes
            self._frames[video] = decoded
        return decoded

    def expect(self, indices: Sequence[int], models: Sequence[Any]) -> None:
        """Start decoding the videos of these examples, except those that are not needed again."""
        videos = []
        for index in indices:
            video = self.examples[index].footage
            if (
                self._kept_prompt(index, models) is None
                and index not in self.broken
                and video not in self._frames
            ):
                videos.append(video)
        self._source.expect(videos)

    def usable(self, index: int, models: Sequence[Any]) -> Prompt | None:
        """Return `prompt_for`; None, with the reason in `broken`, if the video does not decode."""
        if index not in self.broken:
            try:
                return self.prompt_for(index, models)
            except DataError as error:
                self.broken[index] = f"{self.examples[index].source}: {error}"
        return None

    def prompt_for(self, index: int, models: Sequence[Any]) -> Prompt:
        """Return a prompt as these models (`VideoLM`) need it.

        Where their vision features can be shared, a prompt that they have all seen before comes
        without frames, provided that there was room to keep those features.
        """
        if not _share_features(models):
            return self[index]
        kept = self._kept_prompt(index, models)
        if kept is not None:
            return kept
        prompt = self._make(index, keep_frames=False)
        features = self._features.setdefault(prompt.example.footage, {})
        for model in models:
            size = model.video_bytes(prompt.grid_thw)
            if model not in features and size <= self._free:
                self._free -= size
                features[model] = None
        prompt = replace(prompt, features=features)
        if features:
            self._kept[index] = replace(prompt, pixel_values=None)
        return prompt

    def left_out(self) -> list[str]:
        """Return a line for each example of any rank whose video does not decode; the first rank
        prints how many videos PyAV decoded because decord cannot."""
        by_pyav = distributed.gather_dict(dict.fromkeys(sorted(self._source.by_pyav)))
        if by_pyav and distributed.is_first():
            first = next(iter(by_pyav))
            message = (
                f"pyav decoded {len(by_pyav)} of the videos, which decord cannot, first {first}"
            )
            print(f"data.backend=auto: {message}", file=sys.stderr)
        return [*distributed.gather_dict(self.broken).values()]

    def arranged(self, prompts: Sequence[Prompt], models: Sequence[Any]) -> list[Prompt]:
        """Order the prompts of a batch so that those that are forwarded together are neighbours.

        These are prompts of one length and, where the video comes first in the prompt, those of one
        video. Where vision features can be shared, only the first prompt of a video keeps its
        frames; its features serve the others.
        """
        videos = {prompt.example.footage: i for i, prompt in enumerate(prompts)}
        if len(videos) == len(prompts):
            return sorted(prompts, key=lambda prompt: len(prompt.input_ids))
        ordered = sorted(
            prompts,
            key=lambda p: (
                self.template.video_first and videos[p.example.footage],
                len(p.input_ids),
            ),
        )
        if not _share_features(models):
            return ordered
        first: dict[Footage, Prompt] = {}
        for position, prompt in enumerate(ordered):
            before = first.get(prompt.example.footage)
            if before is not None:
                ordered[position] = replace(prompt, features=before.features, pixel_values=None)
                continue
            if any(model not in prompt.features for model in models):  # no room to keep them
                features = dict.fromkeys(models) | prompt.features
                ordered[position] = replace(prompt, features=features)
            first[prompt.example.footage] = ordered[position]
        return ordered

    def _kept_prompt(self, index: int, models: Sequence[Any]) -> Prompt | None:
        """Return the prompt without frames, if the features of all these models are kept."""
        kept = self._kept.get(index)
        complete = kept is not None and all(kept.features.get(m) is not None for m in models)
        return kept if complete else None

    def _make(self, index: int, keep_frames: bool) -> Prompt:
        example, inputs = self.examples[index], self._processed(index, keep_frames)
        ids, decoded = inputs["input_ids"], inputs["decoded"]
        frames, rows, columns = inputs["video_grid_thw"][0].tolist()
        grid = (frames, rows, columns)
        seconds = None
        if self.config.timestamps == "processor":
            seconds = decoded.patch_seconds(self.config.patch_seconds)
        positions, next_position = self.lm.positions(ids, grid, seconds)
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

    def _processed(self, index: int, keep_frames: bool) -> dict[str, Any]:
        """Return the processor's outputs for an example, with `decoded`, its sampled frames.

        The video and the text before it are processed once for successive queries about one video.
        That is exact, because no token spans the end of a video.
        """
        example = self.examples[index]
        head, _, tail = self.text(example).rpartition(VIDEO_END)
        last = self._last
        if last is None or (last["video"], last["head"]) != (example.footage, head):
            decoded = self.frames(index, keep_frames)
            options = self._budget(len(decoded.frames)).options
            processor = self.processor.video_processor
            options = {name: x for name, x in options.items() if hasattr(processor, name)}
            inputs = self.processor(
                text=[head + VIDEO_END],
                videos=[decoded.frames],
                video_metadata=[decoded.metadata()],
                do_sample_frames=False,
                return_tensors="pt",
                **options,
            )
            if self.config.timestamps == "text":
                inputs["input_ids"] = self._interleaved(head, inputs["video_grid_thw"][0], decoded)
            last = {"video": example.footage, "head": head, "decoded": decoded, "inputs": inputs}
            self._last = last
        rest = torch.tensor(self.tokenizer(tail).input_ids, dtype=torch.long)
        ids = torch.cat([last["inputs"]["input_ids"][0], rest])
        return {**last["inputs"], "input_ids": ids, "decoded": last["decoded"]}

    def _interleaved(self, head: str, grid_thw: torch.Tensor, decoded: VideoFrames) -> torch.Tensor:
        """Return the token ids `[1, P]` of a prompt up to the end of its video, with every temporal
        patch in a vision segment of its own behind the time of its first frame."""
        pad = self.processor.video_token
        _, rows, columns = grid_thw.tolist()
        tokens = rows * columns // self.processor.video_processor.merge_size**2
        segment = VIDEO_START + pad * tokens + VIDEO_END
        text = head.removesuffix(VIDEO_START + pad)
        text += "".join(f"{time_s:.1f}{segment}" for time_s in decoded.times_s[::TEMPORAL_PATCH])
        return torch.tensor([self.tokenizer(text).input_ids], dtype=torch.long)

    def _budget(self, frames: int) -> Budget:
        """Return the budget of the video processor for a video of `frames` frames."""
        return budget_of(self.config, self.processor.video_processor, self.lm.family, frames)


def _share_features(models: Sequence[Any]) -> bool:
    """Return whether the features of one prompt's video may serve other prompts.

    All towers must be frozen, and none sharded: then all ranks must forward it equally often.
    """
    return bool(models) and not any(model.trains_vision or model.sharded for model in models)
