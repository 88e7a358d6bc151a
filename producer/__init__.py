"""What to run, when, and what the trainer receives."""

from producer.asynchronous import AsyncProduceStrategy
from producer.experience import make_experience
from producer.filters import GroupFilter, zero_variance
from producer.predict import LongestPredictedFirst, SimilarPredictedTogether
from producer.prompts import PromptSampler, ReplayPromptSampler
from producer.replay import ReplaySource
from producer.strategy import ProducedBatch, ProduceStrategy
from producer.sync import SyncProduceStrategy

__all__ = [
    "AsyncProduceStrategy",
    "GroupFilter",
    "LongestPredictedFirst",
    "ProduceStrategy",
    "ProducedBatch",
    "PromptSampler",
    "ReplayPromptSampler",
    "ReplaySource",
    "SimilarPredictedTogether",
    "SyncProduceStrategy",
    "make_experience",
    "zero_variance",
]
