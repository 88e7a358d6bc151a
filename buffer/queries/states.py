"""What parts of a run keep with it: a JSON value by name and step."""

from sqlalchemy import Connection, bindparam, delete, select

from buffer import schema as t
from buffer.queries.dialects import Prepared, Upsert

_s = t.states.c

_RECORD = Upsert(t.states, ["name", "step"], lambda new: {"state": new.state})
_STATE_AT = Prepared(
    select(_s.step, _s.state).where(_s.name == bindparam("of"), _s.step <= bindparam("at")).order_by(_s.step.desc()).limit(1)
)
_DROP_AFTER = delete(t.states).where(_s.step > bindparam("at"))


def record_state(conn: Connection, name: str, step: int, state: str) -> None:
    """Write down the state of `name` at `step`, in place of what is there."""
    _RECORD.execute(conn, {"name": name, "step": step, "state": state})


def state_at(conn: Connection, name: str, step: int) -> tuple[int, str] | None:
    """The last step up to `step` at which `name` had a state written down, and that state; None where there is none."""
    rows = _STATE_AT.all(conn, {"of": name, "at": step})
    return (rows[0][0], rows[0][1]) if rows else None


def drop_states_after(conn: Connection, step: int) -> None:
    """Forget the states at steps later than `step`."""
    conn.execute(_DROP_AFTER, {"at": step})
