"""What can go wrong at the boundary of the replay buffer."""


class ReplayBufferError(Exception):
    """Root of every error that the buffer raises for a reason of its own."""


class BufferClosedError(ReplayBufferError, RuntimeError):
    """The buffer was used before it was opened or after it was closed."""


class IllegalTransitionError(ReplayBufferError, ValueError):
    """A group would go from one status to another that the transition table does not allow."""


class LeaseLostError(IllegalTransitionError):
    """A group that this process ran is not its own any more: its lease ran out, and it was given to others."""


class UnknownGroupError(ReplayBufferError, LookupError):
    """No group with this id is in the database."""


class DuplicateGroupError(ReplayBufferError, ValueError):
    """A prompt or a group id would be recorded twice."""


class ResumeRequiredError(ReplayBufferError, RuntimeError):
    """Batches were consumed but never committed; the trainer has to say from which step it resumes."""


class StepError(ReplayBufferError, ValueError):
    """A step lies where it cannot: taken before what is committed, or rewound behind it."""


class CursorConflictError(ReplayBufferError, RuntimeError):
    """Two samplers draw for one task: the dataset cursor is not where this one left it."""


class DatabaseError(ReplayBufferError, OSError):
    """The database cannot be opened or written: missing folder, read-only, full, truncated."""


class ForeignDatabaseError(DatabaseError):
    """The file is a database, but not one of Millrace's."""


class SchemaVersionError(DatabaseError):
    """The database was written by another version of Millrace than this one can read; `stored` is its schema's version."""

    def __init__(self, message: str, stored: str) -> None:
        super().__init__(message)
        self.stored = stored


class BufferLockedError(DatabaseError):
    """Another process writes to this SQLite file."""


class CorruptPayloadError(DatabaseError):
    """A stored payload does not decode: lengths and bytes disagree."""


class FileFormatError(ReplayBufferError, ValueError):
    """A file of groups cannot be read: it is foreign, damaged or cut off."""
