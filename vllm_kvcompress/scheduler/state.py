"""What the planner remembers of one request, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcompress.scheduler.trajectory import Trajectory


@dataclass
class Totals:
    """Counts since the engine started (plans that a preemption or abort dropped included).

    Attributes
    ----------
    compactions : int
        Compactions of one request in one KV cache group.
    requests : int
        Times a request was compacted for the first time (again after each preemption).
    tokens_removed : int
        Tokens removed, summed over groups.
    blocks_freed : int
        Blocks given up by requests.
    waits : int
        Times a due compaction had to wait for blocks.
    """

    compactions: int = 0
    requests: int = 0
    tokens_removed: int = 0
    blocks_freed: int = 0
    waits: int = 0


@dataclass(slots=True)
class RequestState:
    """Where a request is on its trajectory.

    Attributes
    ----------
    trajectory : Trajectory
    started : bool
        Whether a compaction was planned: from then on no block of it is hashed.
    done : set of int
        Groups whose part of the compaction at ``trajectory.position`` is planned.
    position : int
        Position that ``done`` belongs to.
    """

    trajectory: Trajectory
    started: bool = False
    done: set[int] = field(default_factory=set)
    position: int = 0

    def is_due(self, computed: int) -> bool:
        """Whether some group has yet to compact at ``computed`` tokens.

        Asked for every request in every step: two comparisons unless there is one.
        """
        trajectory = self.trajectory
        if computed < trajectory.due and computed != trajectory.position:
            return False
        return bool(self.open_groups(computed))

    def open_groups(self, computed: int) -> set[int]:
        """Groups that have yet to compact at ``computed`` tokens."""
        trajectory = self.trajectory
        trajectory.advance(computed)
        if trajectory.position != computed:
            return set()
        if self.position != computed:
            self.position = computed
            self.done.clear()
        return trajectory.steps.keys() - self.done
