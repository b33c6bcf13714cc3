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
        self.rows = np.zeros((num_groups, max_num_reqs), dtype=np.int32)
        """``[groups, rows]``: rows of the batch, or request slots where ``by_slot``."""
        self.by_slot = by_slot
        # A column per request that has holes; the first one is that of all others.
        self._columns: dict[str, int] = {}
        self._counts = np.zeros((num_groups, max_num_reqs + 1), dtype=np.int32)
        self._unused = list(range(1, max_num_reqs + 1))
        self._arranged: list[str] | None = []
        """Requests in the order of ``rows``; ``None`` if their counts have changed since."""

    def set(self, request_id: str, group: int, holes: int) -> None:
        """Note the holes of a request in one group."""
        column = self._columns.get(request_id)
        if column is None:
            if not self._unused:  # Preempted requests are remembered beside a full batch.
                width = self._counts.shape[1]
                self._counts = np.pad(self._counts, ((0, 0), (0, width)))
                self._unused = list(range(width, 2 * width))
            column = self._columns[request_id] = self._unused.pop()
        self._counts[group, column] = holes
        self._arranged = None

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished or start anew."""
        if self._columns:
            for request_id in request_ids:
                column = self._columns.pop(request_id, None)
                if column is not None:
                    self._counts[:, column] = 0
                    self._unused.append(column)
                    self._arranged = None

    def arrange(self, request_ids: Sequence[str]) -> None:
        """Lay the counts out in batch order (V1 runner, whose rows move)."""
        if self._arranged == request_ids or not (self._columns or self._arranged is None):
            return
        column_of = self._columns.get
        count = len(request_ids)
        columns = np.fromiter((column_of(name, 0) for name in request_ids), np.intp, count)
        np.take(self._counts, columns, axis=1, out=self.rows[:, :count])
        self.rows[:, count:] = 0
        self._arranged = list(request_ids)

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
