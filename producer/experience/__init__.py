"""From finished groups to what a training step takes: advantages, packing, loss reductions. Nothing here imports torch by itself."""

from producer.experience.maker import Experience, make_experience

__all__ = ["Experience", "make_experience"]
