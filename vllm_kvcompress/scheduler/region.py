"""The blocks of a request that a compaction works on, before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.levels import Round
from vllm_kvcompress.scheduler.steps import Step


@dataclass
class Region:
    """The oldest blocks of a request in one group that compaction may change.

    Attributes
    ----------
    blocks : list of KVCacheBlock
        Each once, oldest first.
    levels : list of int
        Their levels; 0 for blocks that are not pooled.
    listed : bool
        Whether a block of level ``l`` stands ``2**l`` times in the row.
    """

    blocks: list[KVCacheBlock]
    levels: list[int]
    listed: bool = False

    @classmethod
    def of_row(
        cls, row: Sequence[KVCacheBlock], first: int, levels: list[int], listed: bool
    ) -> Region:
        """Find the blocks in a row, from index ``first`` on."""
        if not listed:
            return cls(list(row[first : first + len(levels)]), levels)
        region = cls([], levels, listed)
        for level in levels:
            region.blocks.append(row[first])
            first += region.times(level)
        return region

    def times(self, level: int) -> int:
        """How often a block of this level stands in the row."""
        return 1 << level if self.listed else 1

    def references(self) -> dict[int, int]:
        """References that each block has from this region, by block id."""
        if not self.listed:
            return dict.fromkeys([block.block_id for block in self.blocks], 1)
        pairs = zip(self.blocks, self.levels, strict=True)
        return {block.block_id: self.times(level) for block, level in pairs}

    def entries(self) -> list[KVCacheBlock]:
        """The part of the row that these blocks make."""
        if not self.listed:
            return self.blocks
        pairs = zip(self.blocks, self.levels, strict=True)
        return [block for block, level in pairs for _ in range(self.times(level))]


@dataclass
class Change:
    """What a step reads, pools and writes.

    Attributes
    ----------
    before : Region
    step : Step
    sources : list of KVCacheBlock
        Blocks that are read, the pooled ones first; they are written or given up.
    written : int
        Blocks that are written.
    pooled, rounds, outputs
        As in :class:`~vllm_kvcompress.scheduler.plan.CompactionPlan`.
    """

    before: Region
    step: Step
    sources: list[KVCacheBlock]
    written: int
    pooled: int = 0
    rounds: list[Round] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    @classmethod
    def of_step(cls, region: Region, step: Step) -> Change:
        """Work out a step on the blocks of a region."""
        if step.pooled is None:
            return cls(region, step, region.blocks, step.kept)
        pooled, stored = step.pooled, step.pooled.stored
        total = sum(pooled.before) + pooled.fresh
        used = {
            number
            for _, older, newer in pooled.merges.rounds
            for number in (*older, *newer)
            if number < stored
        }
        # The worker numbers what it is given: used blocks, then what ranking leaves over.
        given = sorted(used) + list(range(stored, total))
        numbers = {number: index for index, number in enumerate(given)}
        shift = total - len(given)

        def renumber(number: int) -> int:
            return numbers[number] if number < total else number - shift

        rounds = [
            Round(level, [renumber(n) for n in older], [renumber(n) for n in newer])
            for level, older, newer in pooled.merges.rounds
        ]
        outputs = [renumber(number) for number in pooled.merges.order if number >= stored]
        sources = [region.blocks[pooled.lead + number] for number in sorted(used)]
        written = len(outputs)
        if pooled.ranked:
            sources += region.blocks[stored:]
            written += pooled.ranked - pooled.fresh
        return cls(region, step, sources, written, len(used), rounds, outputs)

    def after(self, destinations: Sequence[KVCacheBlock]) -> Region:
        """The region afterwards.

        Parameters
        ----------
        destinations : sequence of KVCacheBlock
            What is written: the outputs, then the blocks of the best ranked tokens.
        """
        listed = self.before.listed
        if self.step.pooled is None:
            return Region(list(destinations), [0] * len(destinations), listed)
        pooled = self.step.pooled
        held = self.before.blocks[pooled.lead :]
        into = iter(destinations)
        blocks = self.before.blocks[: pooled.lead]
        for number in pooled.merges.order:
            blocks.append(held[number] if number < pooled.stored else next(into))
        best = list(into)
        levels = [0] * pooled.lead + levels_by_age(pooled.merges.counts) + [0] * len(best)
        return Region(blocks + best, levels, listed)


def levels_by_age(counts: Sequence[int]) -> list[int]:
    """Levels of pooled blocks, oldest first, from their number by level."""
    return [level for level in reversed(range(len(counts))) for _ in range(counts[level])]


def levels_before(step: Step) -> list[int]:
    """Levels of the blocks that a step starts from, oldest first."""
    if step.pooled is None:
        return [0] * step.old
    levels = [0] * step.pooled.lead + levels_by_age(step.pooled.before)
    return levels + [0] * (step.old - len(levels))
