"""What the buffer asks of a database, beside the statements that all of them understand."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError

from buffer import migrations, queries, schema
from buffer.errors import DatabaseError, ForeignDatabaseError, ReplayBufferError, SchemaVersionError


class Listener(Protocol):
    """Tells what other processes committed, from its making until `close`."""

    def close(self) -> None:
        """End it; nothing is told any more."""


class OnChange(Protocol):
    """Called on a thread of the listener's. `changed`: (task, status) that became more; None: anything may have."""

    def __call__(self, changed: list[tuple[str, str]] | None, /) -> None: ...


class Backend(ABC):
    """A database that holds a buffer: how to reach it, what is said when that fails, what may be tried again."""

    alone: ClassVar[bool]
    """Whether one process writes: whoever else did is dead."""

    elsewhere: ClassVar[str]
    """What to do where somebody else's tables are in the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Of the database, for messages: without a password."""

    # -- reaching it ---------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(self, *, read_only: bool, pool_size: int = 1) -> Engine:
        """An engine whose transactions cannot fail half-way where they write, and cannot write where they read."""

    def lock(self) -> None:  # noqa: B027 - a database that many may write needs none
        """Take the right to write, where one process has it; `BufferLockedError` names who has it."""

    def unlock(self) -> None:  # noqa: B027
        """Give it up."""

    @abstractmethod
    def prepare(self, conn: Connection) -> None:
        """Make a connection fit for writing: the database is ours, brought forward to this version, or was empty; else refuse."""

    def check(self, conn: Connection) -> None:
        """Refuse to read a database that is not ours, or of another schema version."""
        self._stored_version(conn, to_migrate=False)

    def _stored_version(self, conn: Connection, *, to_migrate: bool) -> int:
        """The schema version of our database; one that is not ours is refused, and one that cannot be used or brought forward."""
        tables = set(inspect(conn).get_table_names())
        if schema.meta.name not in tables:
            what = f"holds other tables ({', '.join(sorted(tables)[:3])})" if tables else "is empty"
            raise ForeignDatabaseError(f"the database {what} and is no Millrace buffer; {self.elsewhere}")
        if queries.meta_value(conn, "unfinished") is not None:
            raise DatabaseError("the database is a fork that was broken off; delete it, and fork again")
        stored, current = queries.meta_value(conn, "schema_version") or "none", schema.SCHEMA_VERSION
        older = stored != str(current) and migrations.migratable(stored, current)
        if stored == str(current) or (older and to_migrate):
            return int(stored)
        newer = stored.isdecimal() and int(stored) > current
        forward = "open it for writing once, as `millrace migrate` does" if older else "restore it from a copy"
        remedy = "install a newer Millrace" if newer else forward
        raise SchemaVersionError(f"the database has schema version {stored}, this Millrace knows {current}; {remedy}", stored)

    def _bring_forward(self, conn: Connection) -> None:
        """Make the database one of this version, in the transaction under way."""
        migrations.migrate(conn, self._stored_version(conn, to_migrate=True), schema.SCHEMA_VERSION)
        queries.set_meta_value(conn, "schema_version", str(schema.SCHEMA_VERSION))

    def create(self, conn: Connection) -> None:
        """Make the tables of this version, in the transaction under way."""
        schema.metadata.create_all(conn, checkfirst=False)
        queries.set_meta_value(conn, "schema_version", str(schema.SCHEMA_VERSION))

    # -- a transaction ---------------------------------------------------------------------------------------------

    def begin(self, conn: Connection, owner: str, lease: float) -> tuple[int, float] | None:
        """At the start of a writing transaction: its number among the owner's, and the time. None: the owner is not known."""
        return 0, time.time()

    def finish(self, tx: queries.Transaction) -> None:  # noqa: B027 - nobody else is there to be told
        """At its end: tell the others what it changed."""

    def committed(self) -> None:  # noqa: B027 - most databases keep house by themselves
        """After it: it is durable."""

    def close(self) -> None:  # noqa: B027
        """No more transactions come; what runs beside them ends."""

    @abstractmethod
    def abandon(self, conn: Connection) -> None:
        """Leave no transaction open after a failure."""

    def is_lost(self, conn: Connection) -> bool:
        """After a failure: whether the connection is gone, so that what was sent last may be done or not."""
        return False

    def is_broken(self, error: DBAPIError) -> bool:
        """Whether a query failed because there was no connection: asked again on another one, it may be answered."""
        return False

    def is_passing(self, error: BaseException) -> bool:
        """Whether a transaction that failed so, and was rolled back, may well succeed when it is done again."""
        return False

    def listen(self, on_change: OnChange) -> Listener:
        """Be told of what other processes commit from now on."""
        raise ReplayBufferError(f"{self.name}: {type(self).__name__} cannot tell what other processes write")

    def traces(self) -> object:
        """What differs after another process has committed, where that is seen without asking the database; else always the same."""
        return None

    # -- errors ----------------------------------------------------------------------------------------------------

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the driver's errors into ours, with the database's name and what to do."""
        try:
            yield
        except ReplayBufferError:
            raise
        except self._errors() as error:
            raise self.as_ours(error) from error

    def as_ours(self, error: BaseException) -> DatabaseError:
        """The error as it is shown."""
        cause = getattr(error, "orig", None) or error
        said = " ".join(str(cause).split())
        return DatabaseError(f"{self.name}: {said}; {self.remedy(cause)}")

    def _errors(self) -> tuple[type[Exception], ...]:
        return (DBAPIError, UnicodeDecodeError)

    @abstractmethod
    def remedy(self, cause: BaseException) -> str:
        """What to do about an error of the driver."""


def first_of(remedies: Iterable[tuple[str, str]], message: str) -> str:
    """The remedy whose key is in the message; where none is, what is certain."""
    return next((remedy for part, remedy in remedies if part in message), "nothing of this transaction was stored")
