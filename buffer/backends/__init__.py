"""The databases that can hold a buffer. What differs between them is here; the statements (`buffer.queries`) are the same."""

import re

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from buffer.backends.base import Backend, Listener, OnChange
from buffer.backends.sqlite import SQLite

__all__ = ["Backend", "Listener", "OnChange", "backend_of"]

_EXAMPLES = "'sqlite:///run.db' or 'postgresql://user:password@host/database'"
_SYNCHRONOUS = ("NORMAL", "FULL")


def backend_of(url: str, synchronous: str = "NORMAL") -> Backend:
    """The database at `url`; anything that is none of ours is refused with what is possible."""
    if synchronous not in _SYNCHRONOUS:
        raise ValueError(f"synchronous={synchronous!r} is unknown; choose one of {_SYNCHRONOUS}")
    parsed = _parse(url)
    match parsed.get_backend_name():
        case "sqlite":
            return SQLite(url, synchronous)
        case "postgresql" | "postgres":
            # Here: psycopg is an extra, and its import would cost everyone who has no use for it.
            from buffer.backends.postgres import PostgreSQL

            return PostgreSQL(parsed)
    raise ValueError(f"{parsed.render_as_string()!r}: only SQLite and PostgreSQL are supported; give a URL like {_EXAMPLES}")


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        shown = re.sub(r":[^:@/]*@", ":***@", url) if isinstance(url, str) else url
        raise ValueError(f"{shown!r} is not a database URL; give one like {_EXAMPLES}") from None
