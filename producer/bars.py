"""`Bars`: two bars on a terminal while a batch is waited for, its groups and the rollouts in flight."""

from types import TracebackType
from typing import Self

from tqdm import tqdm

_IN_FLIGHT = "{desc}: {n_fmt:>4} |{bar}| at most {total_fmt}"


class Bars:
    """Shown from `with` to its end, and gone after it.

    Args:
        task_name: stands before them.
        batch_size: groups.
        disable: show none; None shows them on a terminal only.
    """

    def __init__(self, task_name: str, batch_size: int, disable: bool | None) -> None:
        # With 0 tqdm looks at the time alone, and not at how far a bar went: the second goes up and down.
        self._batch = tqdm(total=batch_size, desc=task_name, unit="group", miniters=0, leave=False, disable=disable)
        self._flight = tqdm(total=1, desc=f"{task_name} in flight", bar_format=_IN_FLIGHT, miniters=0, leave=False, disable=disable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flight.close()
        self._batch.close()

    def completed(self, n: int) -> None:
        """So many groups are completed."""
        self._batch.update(min(n, self._batch.total) - self._batch.n)

    def in_flight(self, n: int) -> None:
        """So many rollouts are in flight; the bar is full at the most that there were."""
        self._flight.total = max(self._flight.total, n)
        self._flight.update(n - self._flight.n)
