"""A real scheduler without a model, and a worker that only keeps books.

The scheduler side is the true one: vLLM's block pool, managers and scheduler with our
subclasses. The worker does what the V1 runner does with block tables and stores, for each
slot of each physical block, *which* token's keys and values are there, or which pair of
slots was pooled into it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from compaction_rule import Compaction, best_ranked, compaction, merge_pairs
from transformers import LlamaConfig
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress import plugin
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE, CompactionPlan
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.scheduler import (
    KVCompressAsyncScheduler,
    KVCompressScheduler,
    KVCompressSchedulerMixin,
)
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import CONFIG_KEY, Phase

STOP_TOKEN = 9
MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class EngineOptions:
    """What a test may vary about an engine; ``limits`` has one entry per KV cache group."""

    limits: tuple[Limits | None, ...]
    block_size: int = 4
    num_blocks: int = 40
    phase: Phase = "after_prefill"
    interval: int = 8
    prune_after: int = 0
    caching: bool = True
    asynchronous: bool = False
    v2_runner: bool = False
    priority: bool = False
    zeroing: bool = False
    whole_prompt_must_fit: bool = True
    tokens_per_step: int = 32
    max_requests: int = 6
    finished_requests: int = 1000


@functools.cache
def _model_config() -> ModelConfig:
    logging.getLogger("vllm").setLevel(logging.WARNING)
    plugin.register()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as path:
        LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            max_position_embeddings=MAX_MODEL_LEN,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(path)
        return ModelConfig(
            model=path, skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_MODEL_LEN
        )


@functools.cache
def _vllm_config() -> VllmConfig:
    return VllmConfig(
        model_config=_model_config(),
        cache_config=CacheConfig(block_size=32),
        scheduler_config=SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=MAX_MODEL_LEN,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
        ),
    )


@dataclass(frozen=True)
class Wishes:
    """What a request asks for: other limits than the engine's, and a context."""

    options: EngineOptions
    context: int | None = None

    def schedule(self) -> Schedule:
        """The schedule of a request with these wishes."""
        return Schedule(
            method="of the request",
            phase=self.options.phase,
            interval=self.options.interval,
            prune_after=self.options.prune_after,
            limits=self.options.limits,
            block_size=self.options.block_size,
            max_position=MAX_MODEL_LEN,
        )

    def trajectory(self, prompt: int) -> Trajectory:
        """When a request with these wishes compacts."""
        return Trajectory(self.schedule(), prompt, self.context)


def build_scheduler(options: EngineOptions) -> KVCompressSchedulerMixin:
    """Our scheduler for these options; vLLM's config is shared, so it is read at once."""
    config = _vllm_config()
    config.additional_config = {
        CONFIG_KEY: {
            "phase": options.phase,
            "interval": options.interval,
            "prune_after": options.prune_after,
            "finished_requests": options.finished_requests,
        }
    }
    config.cache_config.block_size = options.block_size
    config.cache_config.num_gpu_blocks = options.num_blocks
    config.cache_config.enable_prefix_caching = options.caching
    scheduling = config.scheduler_config
    scheduling.max_num_seqs = options.max_requests
    scheduling.max_num_batched_tokens = options.tokens_per_step
    scheduling.async_scheduling = options.asynchronous
    scheduling.policy = "priority" if options.priority else "fcfs"
    scheduling.scheduler_reserve_full_isl = options.whole_prompt_must_fit
    groups = [
        KVCacheGroupSpec(
            [f"model.layers.{index}.self_attn"],
            CompressedAttentionSpec(
                block_size=options.block_size,
                num_kv_heads=1,
                head_size=16,
                dtype=torch.float32,
                band=-1 if limits is None else index,
                limits=limits,
                phase=options.phase,
                interval=options.interval,
                prune_after=options.prune_after,
            ),
        )
        for index, limits in enumerate(options.limits)
    ]
    cls = KVCompressAsyncScheduler if options.asynchronous else KVCompressScheduler
    scheduler = cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(options.num_blocks, [], groups),
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=options.block_size,
    )
    scheduler.use_v2_model_runner = options.v2_runner
    if options.zeroing:
        scheduler.needs_kv_cache_zeroing = True
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            manager._record_new_block_ids = True
    return scheduler


def make_request(
    options: EngineOptions, name: str, prompt: Sequence[int], max_tokens: int, priority: int = 0
) -> Request:
    """A request that ends after ``max_tokens`` or at the stop token."""
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens, stop_token_ids=[STOP_TOKEN]),
        pooling_params=None,
        priority=priority,
        arrival_time=float(name),
        block_hasher=get_request_block_hasher(options.block_size, sha256),
    )


def block_rows(scheduler: KVCompressSchedulerMixin) -> dict[str, list[list[Any]]]:
    """The managers' block lists by request, one list per group."""
    rows: dict[str, list[list[Any]]] = {}
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for group, manager in enumerate(managers):
        for name, row in manager.req_to_blocks.items():
            rows.setdefault(name, [[] for _ in managers])[group] = row
    return rows


def run_alone(
    options: EngineOptions, texts: Texts, prompt: Sequence[int], outputs: int, wishes: Wishes
) -> list[Compaction]:
    """Compactions of one request in an engine of its own with room for everything."""
    alone = replace(
        options, num_blocks=500, caching=False, asynchronous=False, priority=False, v2_runner=False
    )
    scheduler = build_scheduler(alone)
    scheduler.kvcompress.trajectory_of = lambda request: wishes.trajectory(len(prompt))
    worker = BookkeepingWorker(alone, texts, {"0": wishes})
    scheduler.add_request(make_request(alone, "0", prompt, outputs))
    while "0" in scheduler.requests:
        output = scheduler.schedule()
        scheduler.update_from_output(output, worker.execute(output, scheduler.requests))
    return worker.requests["0"].plans


class Texts:
    """Names every distinct prefix of tokens by a number, and plays the model."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}

    def extend(self, nodes: list[int], tokens: Iterable[int]) -> None:
        """Add the prefixes that end at each of ``tokens`` to the list of prefixes so far."""
        for token in tokens:
            key = (nodes[-1] if nodes else 0, token)
            nodes.append(self._nodes.setdefault(key, len(self._nodes) + 1))

    def document(self, first: int, length: int) -> list[int]:
        """The model's own text after a first token, so that prompts and outputs coincide."""
        tokens, nodes = [first], []
        self.extend(nodes, tokens)
        while len(tokens) < length:
            tokens.append(self.next_token(nodes[-1]))
            self.extend(nodes, tokens[-1:])
        return tokens

    @staticmethod
    def next_token(node: int) -> int:
        """What the model says after a prefix: the same whenever it is asked."""
        mixed = (node * 2654435761 & 0xFFFFFFFF) >> 12
        return STOP_TOKEN if mixed % 61 == 0 else 1 + mixed % 2


@dataclass
class WorkerRequest:
    """A worker's view of one request.

    Attributes
    ----------
    tokens, nodes : list of int
        Known tokens, and the prefix that ends at each of them.
    prompt : int
        Length of the prompt.
    wishes : Wishes
        What the request asks for.
    base : int
        Leading blocks' worth of tokens that are left alone from now on.
    rows : list of list of int
        Block table row per group.
    known : list of list of int
        What was computed for each token of the request, per group.
    front : list of list of int
        What attention should see, per group, of all blocks that the last compaction left.
    behind : list of int
        Position per group from which attention should see the tokens as computed.
    contents : list of (list of list of int)
        What each block that the last compaction left should hold, per group.
    last : list of (Compaction or None)
        Last compaction per group.
    holes, removed : list of int
        Null blocks at the start of each row, and blocks given up.
    computed : int
        Tokens computed so far.
    passed : bool
        Whether a token after the context is computed: what follows is noted since then.
    below : list of int
        Blocks given up of the context, per group; ``removed`` counts anew.
    fixed : list of list of int
        ``front`` as the context left it, per group.
    behind_context : list of int
        ``behind`` as the context left it.
    context_levels : list of tuple of int
        Levels of the blocks that the context left, per group.
    plans : list of Compaction
        Compactions since the request was started or resumed.
    """

    tokens: list[int]
    prompt: int
    wishes: Wishes
    base: int
    rows: list[list[int]]
    computed: int
    nodes: list[int] = field(default_factory=list)
    known: list[list[int]] = field(default_factory=list)
    front: list[list[int]] = field(init=False)
    behind: list[int] = field(init=False)
    contents: list[list[list[int]]] = field(init=False)
    last: list[Compaction | None] = field(init=False)
    holes: list[int] = field(init=False)
    removed: list[int] = field(init=False)
    passed: bool = False
    below: list[int] = field(init=False)
    fixed: list[list[int]] = field(init=False)
    behind_context: list[int] = field(init=False)
    context_levels: list[tuple[int, ...]] = field(init=False)
    plans: list[Compaction] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.rows)
        self.front, self.contents = [[] for _ in self.rows], [[] for _ in self.rows]
        self.behind, self.holes, self.removed = [0] * count, [0] * count, [0] * count
        self.last = [None] * count
        self.below = [0] * count
        self.fixed = [[] for _ in self.rows]
        self.behind_context = [0] * count
        self.context_levels = [() for _ in self.rows]

    def limits(self, group: int) -> Limits | None:
        """Limits of the next compaction."""
        limits = self.wishes.options.limits[group]
        past = self.wishes.context is not None and self.computed > self.wishes.context
        return replace(limits, sinks=0) if limits is not None and past else limits

    def listed(self, group: int) -> bool:
        """Whether the row lists a pooled block as often as it stands for blocks."""
        limits = self.wishes.options.limits[group]
        return bool(limits and limits.merging and limits.merging.count)

    def first_entry(self, group: int) -> int:
        """First entry of the row that compaction may change."""
        if self.listed(group):
            return self.base
        return self.base - self.below[group] + self.holes[group]

    def pass_context(self) -> None:
        """Leave what there is of the prompt alone, once a token after the context is computed."""
        if self.passed or self.wishes.context is None or self.computed <= self.wishes.context:
            return
        size = self.wishes.options.block_size
        self.base = -(-self.prompt // size)
        for group, limits in enumerate(self.wishes.options.limits):
            if limits is None:
                continue
            self.context_levels[group] = self.levels(group)
            self.below[group], self.removed[group] = self.removed[group], 0
            self.fixed[group] = self.front[group]
            self.behind_context[group] = self.behind[group]
            self.contents[group], self.last[group] = [], None
        self.passed = True

    def levels(self, group: int) -> tuple[int, ...]:
        """Levels of the blocks from ``base`` on, as far as a compaction has left them."""
        last = self.last[group]
        return last.levels if last is not None else ()


class Pairs:
    """Names every pair of slots, older one first, by a number of its own."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], int] = {}
        self._depths: dict[int, int] = {}

    def name(self, older: int, newer: int) -> int:
        """The slot that two others of the same level are pooled into."""
        known = self._names.get((older, newer))
        if known is None:
            depth = self.depth(older)
            assert depth == self.depth(newer), "slots of different levels are pooled"
            known = self._names[older, newer] = (1 << 50) + len(self._names)
            self._depths[known] = depth + 1
        return known

    def depth(self, slot: int) -> int:
        """How often a slot was pooled."""
        return self._depths.get(slot, 0)

    def neighbours(self, older: Sequence[int], newer: Sequence[int]) -> list[int]:
        """Two blocks into one: first slot with second, third with fourth, and so on."""
        slots = [*older, *newer]
        return [self.name(*slots[index : index + 2]) for index in range(0, len(slots), 2)]

    def span(self, tokens: Sequence[int]) -> int:
        """The slot of ``2**level`` consecutive tokens."""
        if len(tokens) == 1:
            return tokens[0]
        middle = len(tokens) // 2
        return self.name(self.span(tokens[:middle]), self.span(tokens[middle:]))


class BookkeepingWorker:
    """Executes scheduler outputs on a model of the pages.

    A slot holds ``exact(node, group)`` for a token computed with its whole past, a number
    used once and never again for a token computed with a compressed past, or the name of
    the pair of slots that it was pooled from.
    """

    def __init__(
        self, options: EngineOptions, texts: Texts, wishes: Mapping[str, Wishes] | None = None
    ) -> None:
        self.wishes = wishes if wishes is not None else {}
        self.options = options
        self.size = options.block_size
        self.groups = len(options.limits)
        self.phase = options.phase
        self.texts = texts
        self.pairs = Pairs()
        self.pages = [[0] * self.size for _ in range(options.num_blocks)]
        self.noted: dict[int, list[int]] = {}
        """What a compaction last wrote to a block: workers remember positions of its keys."""
        self.requests: dict[str, WorkerRequest] = {}
        self._inexact = itertools.count(-1, -1)

    @staticmethod
    def exact(node: int, group: int) -> int:
        """What a slot holds for the last token of a prefix, computed in full."""
        return node * 8 + group

    def execute(self, output: SchedulerOutput, known: dict[str, Request]) -> ModelRunnerOutput:
        """Take in one step in the order of the V1 runner, run it and sample."""
        plans = getattr(output, PLANS_ATTRIBUTE, [])
        for plan in plans:
            self._compact(plan)
        for name in output.finished_req_ids:
            self.requests.pop(name, None)
        for block in output.new_block_ids_to_zero or ():
            self.pages[block] = [0] * self.size
        fresh = self._update_rows(output, known)
        for name, count in output.num_scheduled_tokens.items():
            self._write(self.requests[name], count)
        for name in fresh:
            assert not any(plan.request_id == name for plan in plans)
        for name in output.num_scheduled_tokens:
            self.check_contents(name)
        return self._sample(output)

    def check_contents(self, name: str) -> None:
        """Attention must see, through the block table, exactly what the request should."""
        request = self.requests[name]
        for group, row in enumerate(request.rows):
            holes = request.holes[group]
            live = request.front[group] + request.known[group][request.behind[group] :]
            seen = self._slots(row[holes:])
            assert row[:holes] == [0] * holes
            assert 0 not in row[holes:]
            assert len(live) == request.computed - holes * self.size
            assert seen[: len(live)] == live, f"request {name}, group {group}: wrong contents"

    def _slots(self, blocks: Sequence[int]) -> list[int]:
        return list(itertools.chain.from_iterable([self.pages[block] for block in blocks]))

    def _cut(self, slots: Sequence[int]) -> list[list[int]]:
        """Slots as blocks."""
        return [list(slots[i : i + self.size]) for i in range(0, len(slots), self.size)]

    def _compact(self, plan: CompactionPlan) -> None:
        request = self.requests[plan.request_id]
        limits, listed = request.limits(plan.group), request.listed(plan.group)
        assert limits is not None
        row, before = request.rows[plan.group], request.holes[plan.group]
        end = before + len(plan.row_ids)
        assert plan.sinks == limits.sinks
        asked = plan.request_id in self.wishes
        assert plan.method == ("of the request" if asked else "kvdiff")
        assert plan.position == request.computed
        assert plan.row_start == before
        assert plan.end == end * self.size, "the sources end elsewhere"
        assert plan.holes == (0 if listed else before + plan.removed)
        assert plan.removed > 0
        assert len(set(plan.sources)) == len(plan.sources)
        assert len(set(plan.destinations)) == len(plan.destinations)
        old = end - request.base - request.removed[plan.group]
        blocks = list(dict.fromkeys(row[request.first_entry(plan.group) : end]))
        assert len(blocks) == old, "the row lists blocks too often or not often enough"
        last = request.last[plan.group]
        step = compaction(limits, plan.position, plan.group, old, old - plan.removed, last)
        assert plan.sources == [blocks[index] for index in step.read], "wrong blocks are read"

        self._expect(request, step, limits, end * self.size)
        if limits.merging is not None and limits.merging.share is not None:
            self._check_exact(request, plan)
        written = self._written(plan, limits)
        assert len(written) == len(plan.destinations)
        for block, slots in zip(plan.destinations, written, strict=True):
            self.pages[block], self.noted[block] = list(slots), list(slots)
        row[before:end] = plan.row_ids
        request.holes[plan.group] = plan.holes
        request.removed[plan.group] += plan.removed
        request.last[plan.group] = step
        request.plans.append(step)

    def _written(self, plan: CompactionPlan, limits: Limits) -> list[list[int]]:
        """What a plan writes, block by block, worked out as a worker does."""
        blocks = [self.pages[block] for block in plan.sources[: plan.pooled]]
        ranked = self._slots(plan.sources[plan.pooled :])
        kept = best_ranked(len(ranked), self.size * (len(plan.destinations) - len(plan.outputs)))
        assert len(kept) >= limits.sinks or not ranked, "the sinks do not fit"
        best = [ranked[index] for index in kept]
        if limits.merging is None:
            assert not (plan.pooled or plan.rounds or plan.outputs)
            return self._cut(best)
        chosen = set(kept)
        blocks += self._cut([slot for i, slot in enumerate(ranked) if i not in chosen])
        for level, older, newer in plan.rounds:
            numbers = {*older, *newer}
            assert len(numbers) == len(older) + len(newer), "a round merges a block twice"
            assert numbers <= set(range(len(blocks))), "a round merges a block that is not there"
            pairs = [(blocks[a], blocks[b]) for a, b in zip(older, newer, strict=True)]
            for slot in itertools.chain.from_iterable(itertools.chain.from_iterable(pairs)):
                assert self.pairs.depth(slot) == level, "a round of another level"
            blocks += [self.pairs.neighbours(*pair) for pair in pairs]
        return [blocks[output] for output in plan.outputs] + self._cut(best)

    def _check_exact(self, request: WorkerRequest, plan: CompactionPlan) -> None:
        """A worker takes the last ``exact`` blocks for plain tokens that end at ``end``."""
        known = request.known[plan.group]
        written = plan.sources[: len(plan.sources) - plan.exact]
        tokens = self._slots(plan.sources[len(written) :])
        assert len(tokens) == plan.exact * self.size
        assert tokens == known[plan.end - len(tokens) : plan.end], "exact blocks are not"
        for block in written:
            assert self.noted.get(block) == self.pages[block], "nobody noted what a block holds"

    def _expect(self, request: WorkerRequest, step: Compaction, limits: Limits, end: int) -> None:
        """Note what attention should see from now on, whatever the plan does."""
        known, size = request.known[step.group], self.size
        start, merging = request.base * size, limits.merging
        held = request.contents[step.group]
        held = held + self._cut(known[end - (step.old - len(held)) * size : end])
        assert len(held) == step.old
        if merging is None:
            slots = [slot for block in held for slot in block]
            after = [slots[i] for i in best_ranked(len(slots), step.kept * size)]
            contents = self._cut(after)
        elif merging.share is None:
            # Every slot stands for consecutive tokens: levels say which.
            contents, position = [], start
            for level in step.levels:
                tokens = known[position : position + (size << level)]
                width = 1 << level
                contents.append(
                    [self.pairs.span(tokens[i : i + width]) for i in range(0, len(tokens), width)]
                )
                position += size << level
            assert position == end
        else:
            last = request.last[step.group]
            levels = last.levels[: last.pooled] if last is not None else ()
            slots = [slot for block in held[len(levels) :] for slot in block]
            best = best_ranked(len(slots), (step.kept - step.pooled) * size)
            rest = self._cut([slot for i, slot in enumerate(slots) if i not in set(best)])
            pool = zip((*levels, *(0 for _ in rest)), held[: len(levels)] + rest, strict=True)
            merged = merge_pairs(list(pool), step.pooled, self.pairs.neighbours)
            assert tuple(level for level, _ in merged) == step.levels[: step.pooled]
            contents = [block for _, block in merged] + self._cut([slots[i] for i in best])
        times = [1 << level if merging and merging.count else 1 for level in step.levels]
        assert len(contents) == step.kept
        request.contents[step.group] = contents
        since = request.behind_context[step.group]
        request.front[step.group] = request.fixed[step.group] + known[since:start]
        for block, count in zip(contents, times, strict=True):
            request.front[step.group] += block * count
        request.behind[step.group] = end

    def _update_rows(self, output: SchedulerOutput, known: dict[str, Request]) -> set[str]:
        """Rows of new, resumed and running requests; returns the first two kinds."""
        fresh = set()
        for new in output.scheduled_new_reqs:
            self._start(known[new.req_id], new.block_ids, new.num_computed_tokens)
            fresh.add(new.req_id)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            if name in cached.resumed_req_ids:
                self._start(known[name], blocks, cached.num_computed_tokens[index])
                fresh.add(name)
                continue
            request = self.requests[name]
            assert request.computed == cached.num_computed_tokens[index]
            for row, new_ids in zip(request.rows, blocks or (), strict=bool(blocks)):
                row.extend(new_ids)
        return fresh

    def _start(self, request: Request, blocks: Sequence[list[int]], computed: int) -> None:
        prompt_blocks = -(-request.num_prompt_tokens // self.size)
        wishes = self.wishes.get(request.request_id, Wishes(self.options))
        mine = self.requests[request.request_id] = WorkerRequest(
            tokens=list(request.all_token_ids),
            prompt=request.num_prompt_tokens,
            wishes=wishes,
            base=prompt_blocks if self.phase == "decode" else 0,
            rows=[list(row) for row in blocks],
            computed=computed,
        )
        self.texts.extend(mine.nodes, mine.tokens)
        # A prefix-cache hit must be the request's own prefix, computed in full.
        mine.known = [
            [self.exact(node, group) for node in mine.nodes[:computed]]
            for group in range(self.groups)
        ]

    def _write(self, request: WorkerRequest, count: int) -> None:
        end = request.computed + count
        assert end <= len(request.tokens)
        for group, row in enumerate(request.rows):
            for position in range(request.computed, end):
                slot = (
                    next(self._inexact)
                    if request.plans
                    else self.exact(request.nodes[position], group)
                )
                block = row[position // self.size]
                assert block != 0
                self.pages[block][position % self.size] = slot
                request.known[group].append(slot)
        request.computed = end
        request.pass_context()

    def _sample(self, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.requests[name]
            new = []
            if request.computed == len(request.tokens):
                new = [self.texts.next_token(request.nodes[-1])]
                request.tokens += new
                self.texts.extend(request.nodes, new)
            sampled.append(new)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
