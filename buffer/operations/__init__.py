"""What the writer does in a transaction: each operation takes all requests of its kind that wait, in order.

An operation either does all of them or raises; the writer then repeats them one by one, so that one bad request
fails alone. Operations hold no state, so repeating after a rollback is safe.
"""

from collections.abc import Callable, Sequence
from typing import Any

from buffer.operations.consuming import Take, Taken, check_step, committed_step, give_back, next_step, take
from buffer.operations.drawing import Draw, DrawnRow, cursor, draw
from buffer.operations.expiring import Expire, Expired, expire
from buffer.operations.pruning import Prune, PrunedSlice, prune, prune_bounds
from buffer.operations.rewinding import Commit, ResumeReport, Rewind, Rewound, commit, resume
from buffer.operations.running import (
    Claim,
    Opened,
    Opening,
    claim,
    closing,
    counted,
    fail,
    opened,
    release,
    release_claimed,
    release_dead,
    start,
)
from buffer.operations.sharing import TakeTogether, take_together
from buffer.operations.states import SaveState, save_state
from buffer.operations.storing import Checkpoint, Put, checkpoint, put
from buffer.operations.transfer import Restore, restore
from buffer.queries import Transaction

Operation = Callable[[Transaction, Sequence[Any]], Sequence[Any]]

__all__ = [
    "Checkpoint",
    "Claim",
    "Commit",
    "Draw",
    "DrawnRow",
    "Expire",
    "Expired",
    "Opened",
    "Opening",
    "Operation",
    "Prune",
    "PrunedSlice",
    "Put",
    "ResumeReport",
    "Restore",
    "Rewind",
    "Rewound",
    "SaveState",
    "Take",
    "TakeTogether",
    "Taken",
    "check_step",
    "checkpoint",
    "claim",
    "closing",
    "commit",
    "counted",
    "committed_step",
    "cursor",
    "draw",
    "expire",
    "fail",
    "give_back",
    "next_step",
    "opened",
    "prune",
    "prune_bounds",
    "put",
    "release",
    "release_claimed",
    "release_dead",
    "restore",
    "resume",
    "save_state",
    "start",
    "take",
    "take_together",
]
