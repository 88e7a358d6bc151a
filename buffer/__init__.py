"""What a rollout is, and the durable store that keeps them."""

from buffer.operations import DrawnRow, ResumeReport
from buffer.policies import Fifo, FreshestFirst, StalestFirst, TakePolicy
from buffer.queries import RecordedStep
from buffer.replay_buffer import AuditReport, DatasetCursor, ReplayBuffer
from buffer.rollout import Position, RolloutGroup, RolloutState, Turn
from buffer.status import Status

__all__ = [
    "AuditReport",
    "DatasetCursor",
    "DrawnRow",
    "Fifo",
    "FreshestFirst",
    "Position",
    "RecordedStep",
    "ReplayBuffer",
    "ResumeReport",
    "RolloutGroup",
    "RolloutState",
    "StalestFirst",
    "Status",
    "TakePolicy",
    "Turn",
]
