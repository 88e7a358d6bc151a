"""What a rollout is, and the durable store that keeps them."""

from buffer.accounts import Account
from buffer.asking import Transition
from buffer.audit import AuditReport
from buffer.forking import ForkReport
from buffer.keeping import PruneReport
from buffer.operations import DrawnRow, ResumeReport
from buffer.overview import Overview
from buffer.policies import Fifo, FreshestFirst, StalestFirst, TakePolicy
from buffer.queries import RecordedStep
from buffer.replay_buffer import DatasetCursor, ReplayBuffer
from buffer.report import RunReport
from buffer.rollout import Position, RolloutGroup, RolloutState, Turn
from buffer.sharing import Share
from buffer.status import Status

__all__ = [
    "Account",
    "AuditReport",
    "DatasetCursor",
    "DrawnRow",
    "Fifo",
    "ForkReport",
    "FreshestFirst",
    "Overview",
    "Position",
    "RecordedStep",
    "PruneReport",
    "ReplayBuffer",
    "ResumeReport",
    "RolloutGroup",
    "RolloutState",
    "RunReport",
    "Share",
    "StalestFirst",
    "Status",
    "TakePolicy",
    "Transition",
    "Turn",
]
