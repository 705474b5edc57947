"""RowsInOrder: what processes compute for each image, batch by batch, put together in the order of the images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from restnet_hf.distributed import gather


LEAST_ROWS = 1024  # that a column has room for


class RowsInOrder:
    """Rows of tensors by name, collected batch by batch on each process.

    Each column is one tensor with room for more. A small tensor for each batch, kept between large ones that come and
    go, would keep the allocator from using the memory of the large ones again.
    """

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []  # number and size of each batch
        self.columns: dict[str, Tensor] = {}
        self.count = 0

    def put(self, number: int, rows: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch.

        Args:
            number: number of the batch among those of all processes.
            rows: tensors (n, ...) on any device, of the same names and types for each batch.
        """
        size = len(next(iter(rows.values())))
        for name, values in rows.items():
            column = self.columns.get(name)
            if column is None or len(column) < self.count + size:
                self.columns[name] = column = self._with_room(column, values, size)
            column[self.count : self.count + size] = values
        self.places.append((number, size))
        self.count += size

    def _with_room(self, column: Tensor | None, values: Tensor, size: int) -> Tensor:
        rows = max(LEAST_ROWS, 2 * (self.count + size))
        larger = torch.empty((rows, *values.shape[1:]), dtype=values.dtype)
        if column is not None:
            larger[: self.count] = column[: self.count]
        return larger

    def own(self) -> dict[str, Tensor]:
        """The rows of this process by name, in the order in which they came."""
        return {name: column[: self.count] for name, column in self.columns.items()}

    def all(self) -> dict[str, Tensor]:
        """The rows of all processes by name, in the order of the batches; none where there was no batch."""
        parts, columns = [], list[dict[str, Tensor]]()
        own = {name: rows.clone() for name, rows in self.own().items()}  # views would be sent with all of their room
        for process, (places, found) in enumerate(gather((self.places, own))):
            columns.append(found)
            start = 0
            for number, size in places:
                parts.append((number, process, start, start + size))
                start += size
        parts.sort()
        names = next((list(each) for each in columns if each), [])
        return {name: torch.cat([columns[at][name][start:end] for _, at, start, end in parts]) for name in names}
