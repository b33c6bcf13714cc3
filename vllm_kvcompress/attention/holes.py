"""How many null blocks lead each row of the batch, per KV cache group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class HoleCounts:
    """Hole counts of the requests on a worker, and of the rows of the current batch.

    They come from the plans; block tables are never searched for null blocks.

    Parameters
    ----------
    num_groups, max_num_reqs : int
        KV cache groups and request slots of the runner.
    by_slot : bool
        Whether counts are kept by request slot (V2 runner) instead of batch row (V1).
    """

    def __init__(self, num_groups: int, max_num_reqs: int, by_slot: bool = False) -> None:
        self._requests: dict[str, np.ndarray] = {}
        self._num_groups = num_groups
        self.rows = np.zeros((num_groups, max_num_reqs), dtype=np.int32)
        """``[groups, rows]``: rows of the batch, or request slots where ``by_slot``."""
        self.by_slot = by_slot

    def set(self, request_id: str, group: int, holes: int) -> None:
        """Note the holes of a request in one group."""
        counts = self._requests.get(request_id)
        if counts is None:
            counts = self._requests[request_id] = np.zeros(self._num_groups, dtype=np.int32)
        counts[group] = holes

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished or start anew."""
        if self._requests:
            for request_id in request_ids:
                self._requests.pop(request_id, None)

    def arrange(self, request_ids: Sequence[str]) -> None:
        """Lay the counts out in batch order (V1 runner, whose rows move)."""
        if not self._requests:
            if self.rows.any():
                self.rows.fill(0)
            return
        none = np.zeros(self._num_groups, dtype=np.int32)
        for row, request_id in enumerate(request_ids):
            self.rows[:, row] = self._requests.get(request_id, none)
        self.rows[:, len(request_ids) :] = 0

    def of_batch(self, group: int, num_reqs: int, slots: np.ndarray | None) -> np.ndarray:
        """Holes of the batch's rows in one group, ``[num_reqs]``, int32.

        Parameters
        ----------
        group : int
        num_reqs : int
            Rows of the batch, padding included.
        slots : numpy.ndarray or None
            Request slot of each row (V2 runner); ``None`` for dummy batches there.
        """
        if not self.by_slot:
            return self.rows[group, :num_reqs]
        holes = np.zeros(num_reqs, dtype=np.int32)
        if slots is not None:
            real = slots[:num_reqs]
            holes[: len(real)] = np.where(real >= 0, self.rows[group, real], 0)
        return holes
