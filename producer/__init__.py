"""What to run, when, and what the trainer receives."""

from producer.adaptive import AdaptiveLimit
from producer.asynchronous import AsyncProduceStrategy
from producer.background import Producer
from producer.evaluation import EvaluationResult
from producer.experience import make_experience
from producer.filters import GroupFilter, all_of, pass_rate, zero_variance
from producer.manager import TaskManager
from producer.members import RedundantMembers
from producer.part import TrainingTask
from producer.plan import ProducedBatch
from producer.predict import LongestPredictedFirst, SimilarPredictedTogether, SortedWindows
from producer.prompts import PromptSampler, ReplayPromptSampler
from producer.replay import ReplaySource
from producer.strategy import ProduceStrategy
from producer.sync import SyncProduceStrategy
from producer.watchdog import Watchdog

__all__ = [
    "AdaptiveLimit",
    "AsyncProduceStrategy",
    "EvaluationResult",
    "GroupFilter",
    "LongestPredictedFirst",
    "ProduceStrategy",
    "ProducedBatch",
    "Producer",
    "PromptSampler",
    "RedundantMembers",
    "ReplayPromptSampler",
    "ReplaySource",
    "SimilarPredictedTogether",
    "SortedWindows",
    "SyncProduceStrategy",
    "TaskManager",
    "TrainingTask",
    "all_of",
    "Watchdog",
    "make_experience",
    "pass_rate",
    "zero_variance",
]
