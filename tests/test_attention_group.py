"""What attention sees of compressed groups: rows without holes, in persistent buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_kvcompress.attention.group import CompressedAttentionGroup
from vllm_kvcompress.attention.heads import BY_HEADS, builders_by_heads
from vllm_kvcompress.attention.holes import HoleCounts

BLOCK = 4
WIDTH = 8
MAX_REQS = 6
GROUP = 1


class Builder:
    """A metadata builder that returns what it is given, and captures as Triton does."""

    supports_update_block_table = True
    device = torch.device("cpu")

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata) -> Any:
        return common

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Any:
        common.seq_lens.fill_(1)
        return common


def make_group(by_slot: bool, always: bool = True) -> CompressedAttentionGroup:
    """A wrapped group, by default with the branch that GPUs take."""
    group = AttentionGroup(
        backend=None,  # type: ignore[arg-type]
        layer_names=["layer"],
        kv_cache_spec=SimpleNamespace(block_size=BLOCK),  # type: ignore[arg-type]
        kv_cache_group_id=GROUP,
        metadata_builders=[Builder()],  # type: ignore[list-item]
    )
    holes = HoleCounts(num_groups=2, max_num_reqs=MAX_REQS, by_slot=by_slot)
    wrapped = CompressedAttentionGroup.wrap(group, holes, MAX_REQS, WIDTH)
    wrapped._always = always
    return wrapped


def make_batch(
    lengths: list[int], queries: list[int], slots: list[int] | None, padded: int | None = None
) -> CommonAttentionMetadata:
    """Metadata of a batch whose row ``i`` holds the blocks ``10 * i + 1, 10 * i + 2, ...``.

    Parameters
    ----------
    lengths, queries : list of int
        Per request.
    slots : list of int or None
        Request slot of each row.
    padded : int or None
        Rows with those of padding, which are zero as vLLM leaves them.
    """
    count, rows = len(lengths), padded or len(lengths)
    table = torch.zeros(rows, WIDTH, dtype=torch.int32)
    for row in range(count):
        table[row] = torch.arange(1, WIDTH + 1) + 10 * row
    starts = np.full(rows + 1, sum(queries), dtype=np.int32)
    starts[: count + 1] = np.cumsum([0, *queries])
    seq_lens = torch.zeros(rows, dtype=torch.int32)
    seq_lens[:count] = torch.tensor(lengths)
    return CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts.copy()),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=rows,
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        req_idx=None if slots is None else np.array(slots, dtype=np.intp),
    )


def test_rows_are_shifted_and_lengths_reduced() -> None:
    group = make_group(by_slot=True)
    group.holes.rows[GROUP, [5, 0, 2]] = [3, 0, 1]
    group.holes.rows[0] = 7  # Another group's counts.
    common = make_batch([30, 9, 22], [1, 9, 6], slots=[5, 0, 2])
    untouched = [t.clone() for t in (common.seq_lens, common.block_table_tensor)]
    common.compute_num_computed_tokens()

    seen = group.build_metadata(common)

    table = seen.block_table_tensor.tolist()
    assert table[0][: WIDTH - 3] == [4, 5, 6, 7, 8]
    assert table[1] == list(range(11, 19))
    assert table[2][: WIDTH - 1] == list(range(22, 29))
    assert seen.seq_lens.tolist() == [30 - 3 * BLOCK, 9, 22 - BLOCK]
    assert seen.seq_lens_cpu_upper_bound.tolist() == seen.seq_lens.tolist()
    assert seen.compute_num_computed_tokens().tolist() == [17, 0, 12]
    assert (seen.max_seq_len, seen.max_query_len) == (30, 9)
    assert common.seq_lens.equal(untouched[0])
    assert common.block_table_tensor.equal(untouched[1])


def test_fewer_heads_have_the_same_rows() -> None:
    """What differs for some heads of a page is made of rows without holes too."""

    class PlanBuilder(Builder):
        isa, num_heads, num_kv_heads = "vec", 8, 4

        def build(self, common_prefix_len: int, common: CommonAttentionMetadata) -> Any:
            return SimpleNamespace(
                heads=(self.num_heads, self.num_kv_heads),
                lengths=common.seq_lens.tolist(),
                first=common.block_table_tensor[:, 0].tolist(),
            )

    group = make_group(by_slot=False)
    assert builders_by_heads(group.metadata_builders[0], [1, 3]) == {}, "nothing differs"
    group.metadata_builders[:] = [PlanBuilder()]
    group.by_heads = builders_by_heads(group.metadata_builders[0], [1, 3])
    group.holes.rows[GROUP, :2] = [3, 1]
    metadata = group.build_metadata(make_batch([30, 9], [1, 1], slots=None))
    wanted = {"lengths": [30 - 3 * BLOCK, 9 - BLOCK], "first": [4, 12]}
    parts = vars(metadata).pop(BY_HEADS)
    assert parts == {
        1: SimpleNamespace(heads=(2, 1), **wanted),
        3: SimpleNamespace(heads=(6, 3), **wanted),
    }
    assert metadata == SimpleNamespace(heads=(8, 4), **wanted)


@given(data=st.data())
def test_every_token_is_found_where_it_lies(data: st.DataObject) -> None:
    group = make_group(by_slot=True)
    count = data.draw(st.integers(1, MAX_REQS))
    slots = data.draw(st.permutations(range(MAX_REQS)))[:count]
    holes = data.draw(st.lists(st.integers(0, WIDTH - 1), min_size=count, max_size=count))
    lengths = [data.draw(st.integers(h * BLOCK + 1, WIDTH * BLOCK)) for h in holes]
    queries = [
        data.draw(st.integers(1, length - h * BLOCK))
        for length, h in zip(lengths, holes, strict=True)
    ]
    padded = data.draw(st.integers(count, MAX_REQS))
    group.holes.rows[:] = 99  # Slots that are not in the batch, and another group.
    group.holes.rows[GROUP, slots] = holes
    common = make_batch(lengths, queries, slots, padded)
    seen = group.build_metadata(common)
    for row, (length, hole) in enumerate(zip(lengths, holes, strict=True)):
        assert seen.seq_lens[row] == seen.seq_lens_cpu_upper_bound[row] == length - hole * BLOCK
        for position in range(hole * BLOCK, length):
            block = seen.block_table_tensor[row, position // BLOCK - hole]
            assert block == common.block_table_tensor[row, position // BLOCK]
    assert not seen.seq_lens[count:].any()
    assert not seen.block_table_tensor[count:].any()


def test_padding_rows_of_full_graphs_stay_empty() -> None:
    group = make_group(by_slot=True)
    group.holes.rows[GROUP] = 2
    seen = group.build_metadata(make_batch([20, 12], [1, 1], slots=[0, 1], padded=5))
    assert seen.seq_lens.tolist() == [12, 4, 0, 0, 0]
    assert seen.seq_lens_cpu_upper_bound.tolist() == [12, 4, 0, 0, 0]
    assert not seen.block_table_tensor[2:].any()


@pytest.mark.parametrize("slots", [None, [0, 1]], ids=["no-slots", "slots"])
def test_dummy_batches_keep_their_queries(slots: list[int] | None) -> None:
    """Dummy runs name the first slots, or none, and claim lengths their rows do not have."""
    group = make_group(by_slot=True)
    group.holes.rows[GROUP] = 3
    common = make_batch([5, 2], [5, 2], slots)
    common.block_table_tensor.zero_()
    seen = group.build_metadata(common)
    assert seen.seq_lens.tolist() == [5, 2]
    assert seen.seq_lens_cpu_upper_bound.tolist() == [5, 2]
    assert not seen.block_table_tensor.any()


def test_without_upper_bound() -> None:
    group = make_group(by_slot=True)
    common = make_batch([5], [1], [0])
    common.seq_lens_cpu_upper_bound = None
    assert group.build_metadata(common).seq_lens_cpu_upper_bound is None


def test_buffers_are_persistent() -> None:
    """CUDA graphs replay addresses: same pointers and strides whatever the batch."""
    group = make_group(by_slot=True)
    batches = [
        make_batch([9], [1], [4]),
        make_batch([5, 6, 7], [5, 6, 7], [0, 1, 2], padded=MAX_REQS),
        make_batch([1], [1], None),
    ]
    seen = []
    for holes, batch in enumerate(batches):
        group.holes.rows[GROUP] = holes
        for build in (group.build_metadata, group.build_metadata_for_cudagraph_capture):
            metadata = build(batch)
            seen.append(
                (
                    metadata.block_table_tensor.data_ptr(),
                    metadata.block_table_tensor.stride(),
                    metadata.seq_lens.data_ptr(),
                )
            )
            assert metadata.seq_lens.data_ptr() != batch.seq_lens.data_ptr()
    assert len(set(seen)) == 1


def test_capture_leaves_the_runners_lengths_alone() -> None:
    group = make_group(by_slot=True)
    common = make_batch([9, 8], [1, 1], [0, 1])
    assert group.build_metadata_for_cudagraph_capture(common).seq_lens.tolist() == [1, 1]
    assert common.seq_lens.tolist() == [9, 8]


def test_cpu_without_holes_costs_nothing() -> None:
    group = make_group(by_slot=False, always=False)
    common = make_batch([9, 8], [1, 1], None)
    assert group.build_metadata(common) is common
    group.holes.set("b", GROUP, 1)
    group.holes.arrange(["a", "b"])
    assert group.build_metadata(common).seq_lens.tolist() == [9, 8 - BLOCK]


def test_wrapping_keeps_the_group_and_stops_the_bypass() -> None:
    group = make_group(by_slot=True)
    assert isinstance(group, AttentionGroup)
    assert group.layer_names == ["layer"]
    assert not group.metadata_builders[0].supports_update_block_table
    assert Builder.supports_update_block_table


def test_rows_follow_the_batch() -> None:
    """V1: rows move, requests leave, wait unscheduled, finish, or start anew."""
    holes = HoleCounts(num_groups=2, max_num_reqs=4)
    holes.set("a", 0, 1)
    holes.set("a", 1, 2)
    holes.set("c", 1, 5)
    holes.arrange(["a", "b", "c"])
    assert holes.rows.tolist() == [[1, 0, 0, 0], [2, 0, 5, 0]]
    assert holes.of_batch(1, 4, None).tolist() == [2, 0, 5, 0]
    holes.arrange(["c"])
    assert holes.rows.tolist() == [[0, 0, 0, 0], [5, 0, 0, 0]]
    holes.arrange(["b", "a"])
    assert holes.rows.tolist() == [[0, 1, 0, 0], [0, 2, 0, 0]]
    holes.drop(["a", "unknown"])
    holes.arrange(["b", "a", "c"])
    assert holes.rows.tolist() == [[0, 0, 0, 0], [0, 0, 5, 0]]
    holes.drop(["c"])
    holes.arrange(["b"])
    assert not holes.rows.any()


def test_counts_of_more_requests_than_there_are_rows() -> None:
    """Those that were preempted are remembered until they finish or start anew."""
    holes = HoleCounts(num_groups=2, max_num_reqs=2)
    for number in range(1, 8):
        holes.set(f"{number}", 1, number)
    holes.arrange(["7", "2"])
    assert holes.rows.tolist() == [[0, 0], [7, 2]]
    holes.arrange(["7", "2"])
    holes.set("2", 0, 9)
    holes.arrange(["7", "2"])
    assert holes.rows.tolist() == [[0, 9], [7, 2]]
    holes.drop([f"{number}" for number in range(1, 8)])
    holes.arrange(["7", "2"])
    assert not holes.rows.any()
    holes.set("8", 0, 3)
    holes.arrange(["7", "8"])
    assert holes.rows.tolist() == [[0, 3], [0, 0]], "the column of another request"


def test_slots_of_the_batch() -> None:
    """V2: counts lie at slots; padding and rows without a request have none."""
    holes = HoleCounts(num_groups=1, max_num_reqs=4, by_slot=True)
    holes.rows[0] = [4, 5, 6, 7]
    assert holes.of_batch(0, 3, np.array([3, -1, 0])).tolist() == [7, 0, 4]
    assert holes.of_batch(0, 4, np.array([2, 1])).tolist() == [6, 5, 0, 0]
    assert holes.of_batch(0, 1, np.array([2, 1])).tolist() == [6]
    assert holes.of_batch(0, 2, None).tolist() == [0, 0]
