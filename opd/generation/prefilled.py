"""The prompts of a micro-batch after their forward, and which of them are learned from."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from opd.data.batch import PromptBatch
from opd.generation.prefix import Prefix


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch in parts without padding (`PromptBatch.parts`), the prefix of each part, and the
    indices of the prompts of each part that are used further."""

    parts: list[PromptBatch]
    prefixes: list[Prefix]
    kept: list[list[int]]

    @classmethod
    def of(cls, parts: list[PromptBatch], prefixes: list[Prefix]) -> "Prefilled":
        """All prompts of these parts."""
        return cls(parts, prefixes, [list(range(len(part.prompts))) for part in parts])

    def take(self, indices: Sequence[int]) -> "Prefilled":
        """The prompts at these indices into the batch; each part must have a single group. A group
        of which no prompt is taken is left out."""
        first = [0, *accumulate(self.counts)]
        kept: dict[int, list[int]] = {}
        for index in indices:
            number = bisect_right(first, index) - 1
            kept.setdefault(number, []).append(index - first[number])
        prefixes = [self.prefixes[number].take(chosen) for number, chosen in kept.items()]
        return Prefilled([self.parts[number] for number in kept], prefixes, [*kept.values()])

    @property
    def counts(self) -> list[int]:
        """Number of prompts of each part."""
        return [len(part.prompts) for part in self.parts]

    def forwarded_by(self, prefill: Callable[[PromptBatch], Prefix]) -> Prefix:
        """The joined prefix of the prompts that are used further, after another model's prefill."""
        pairs = zip(self.parts, self.kept, strict=True)
        return Prefix.join([prefill(part).take(kept) for part, kept in pairs])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt that is used further."""
        pairs = zip(self.parts, self.kept, strict=True)
        return [len(part.prompts[i].input_ids) for part, kept in pairs for i in kept]
