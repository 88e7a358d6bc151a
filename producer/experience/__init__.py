"""From finished groups to what a training step takes: advantages, packing, loss reductions. Nothing here imports torch by itself."""

from producer.experience.arrays import Experience
from producer.experience.attached import Attached
from producer.experience.config import KL, AdvantageConfig
from producer.experience.engine_scorer import EngineScorer
from producer.experience.experience_maker import ExperienceMaker
from producer.experience.kl import AdaptiveKL, kl_estimate
from producer.experience.maker import make_experience
from producer.experience.off_policy import OffPolicy
from producer.experience.presets import preset
from producer.experience.running import RunningMoments
from producer.experience.shaping import Overlong, StopProperly
from producer.experience.statistics import BatchStatistics, batch_statistics

__all__ = [
    "KL",
    "AdaptiveKL",
    "AdvantageConfig",
    "Attached",
    "BatchStatistics",
    "EngineScorer",
    "Experience",
    "ExperienceMaker",
    "OffPolicy",
    "Overlong",
    "RunningMoments",
    "StopProperly",
    "batch_statistics",
    "kl_estimate",
    "make_experience",
    "preset",
]
