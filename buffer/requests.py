"""Requests to a writer, and doing those that wait in one transaction: the same on the writer's thread and in the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from buffer.ahead import Preparable
from buffer.errors import BufferClosedError, ReplayBufferError
from buffer.operations import Operation
from buffer.queries import Deltas, Transaction
from buffer.status import Status
from buffer.transactor import ConnectionGivenUpError, Transactor

Answer = tuple["asyncio.Future[Any]", Any, BaseException | None]
"""A future of the loop, and what it is to be resolved with: a result, or an error."""

OnCommit = Callable[[Mapping[tuple[str, Status], int]], None]
"""Called on the event loop with the changes of the counts, before the answers of their transaction are given."""


@dataclass(slots=True, eq=False)
class Request:
    """An operation that was asked for.

    `outcome` is written by the writer, and read there by an operation that undoes this one: it is known even when the asker
    was cancelled and no longer waits for `answer`.
    """

    operation: Operation
    argument: Any
    answer: "asyncio.Future[Any]"
    outcome: Any = None

    @property
    def size(self) -> int:
        """Bytes that it will write, 0 where they are few."""
        return self.argument.size if isinstance(self.argument, Preparable) else 0


def transact(transactor: Transactor, batch: Sequence[Request], deltas: Deltas) -> list[Answer]:
    """Do a batch in one transaction, or each request in its own; adds to `deltas` what was committed."""
    if not batch:
        return []
    try:
        answers, changed = transactor.perform(lambda tx: _perform(tx, batch))
    except ConnectionGivenUpError:
        raise
    except BaseException as error:  # noqa: BLE001 - the one place where an operation's failure becomes its caller's
        failure = error
    else:
        deltas.update(changed)
        return answers
    for request in batch:
        request.outcome = None  # after a rollback nothing has come of it
    if len(batch) == 1 or not transactor.begun:
        # A transaction that does not begin (another program holds the file) would not begin for each alone either.
        return [(request.answer, None, presentable(failure)) for request in batch]
    # One request among many was bad. The transaction is rolled back; alone, each gets its own answer.
    return [answer for request in batch for answer in transact(transactor, [request], deltas)]


def _perform(tx: Transaction, batch: Sequence[Request]) -> list[Answer]:
    for operation, requests in groupby(batch, key=lambda request: request.operation):
        same = list(requests)
        results = operation(tx, [request.argument for request in same])
        for request, result in zip(same, results, strict=True):
            request.outcome = result
    return [(request.answer, request.outcome, None) for request in batch]


def presentable(error: BaseException) -> Exception:
    """An error that a future accepts and that does not end its caller's program."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = ReplayBufferError(f"the writer met {error!r}; nothing of this request was stored")
    wrapped.__cause__ = error
    return wrapped


def resolve(answers: Sequence[Answer]) -> None:
    """On the loop: tell those who still wait."""
    for future, result, error in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def refuse(requests: Sequence[Request], error: BaseException | None) -> None:
    """On the loop, after the writer met `error` and ended: it is not known whether these were done."""
    for request in requests:
        refused = BufferClosedError(f"the buffer's writer has ended ({error}); open the buffer again and look at what it holds")
        refused.__cause__ = error
        resolve([(request.answer, None, refused)])
