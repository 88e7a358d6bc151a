"""How stale tokens are: the one definition, used to expire groups, to mask tokens and in metrics. Pure functions of arrays.

Staleness is the current version minus the oldest version among the trainable tokens: of a rollout over its own tokens,
of a group the maximum over its members. Without a trainable token there is nothing that could be stale: None. It is
negative where the policy went back to an earlier version than the tokens' without a rewind, and no bound is exceeded then.

After a rewind the same numbers are given to other weights. A version is therefore told apart by its timeline, the number
of rewinds before it. What these functions call versions are effective ones: see `Timeline.effective`.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_VERSION = 2**62
"""Stands where there is no trainable token: it sorts behind all versions, and is never stale."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The rewinds of a run so far: `forks[t]` is the version to which the rewind went back that ended timeline `t`.

    Weights are named by a timeline and a version. Those of a version beyond a later fork are undone: they exist no more.

    Raises:
        ValueError: a fork is no whole number, or negative.
    """

    forks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for fork in self.forks:
            if not isinstance(fork, int) or not 0 <= fork < NO_VERSION:
                raise ValueError(f"a rewind went back to version {fork!r}; it must be a whole number from 0 to 2**62 - 1")

    @property
    def number(self) -> int:
        """Which timeline this is: 0 before the first rewind."""
        return len(self.forks)

    def rewound(self, version: int) -> "Timeline":
        """The timeline that begins with a rewind to `version`."""
        return Timeline((*self.forks, version))

    def effective(self, versions: NDArray[Any], timelines: NDArray[Any]) -> NDArray[np.int64]:
        """For each token the version from which its staleness is counted on this timeline (int64).

        It is the token's version where those weights still exist. Others lie behind the fork as far as they lay before it:
        then the current version minus this one is the number of updates undone plus those made since.
        """
        own: NDArray[np.int64] = versions.astype(np.int64)
        if self._is_everywhere(timelines):
            return own
        effective: NDArray[np.int64] = own - 2 * np.maximum(own - self._fork_of(timelines), 0)
        return effective

    def undone(self, versions: NDArray[Any], timelines: NDArray[Any]) -> NDArray[np.bool_]:
        """For each token whether the weights that produced it exist no more on this timeline."""
        if self._is_everywhere(timelines):
            return np.zeros(versions.shape, np.bool_)
        undone: NDArray[np.bool_] = versions > self._fork_of(timelines)
        return undone

    def _is_everywhere(self, timelines: NDArray[Any]) -> bool:
        return not self.forks or not timelines.size or bool(timelines.min() >= self.number)

    def _fork_of(self, timelines: NDArray[Any]) -> NDArray[np.int64]:
        """For each token the version at which its branch leaves this timeline's."""
        forks: NDArray[np.int64] = _lowest_forks(self.forks)[np.minimum(timelines, self.number)]
        return forks


@lru_cache(maxsize=64)
def _lowest_forks(forks: tuple[int, ...]) -> NDArray[np.int64]:
    """For each timeline the lowest fork from its end on: a token keeps a version only if every rewind since left it."""
    backwards = np.array([NO_VERSION, *reversed(forks)], np.int64)
    lowest: NDArray[np.int64] = np.minimum.accumulate(backwards)[::-1]
    return lowest


FIRST_TIMELINE = Timeline()
"""That of a run which was never rewound."""


class Level(StrEnum):
    """What makes a member too stale: one stale trainable token ("sequence"), or no fresh one beside them ("token")."""

    SEQUENCE = "sequence"
    TOKEN = "token"


def oldest_version(versions: NDArray[Any], loss_mask: NDArray[Any]) -> int | None:
    """The oldest version among the trainable tokens (mask 1) of one rollout; None where there is none."""
    if not versions.size:
        return None
    trainable = versions[loss_mask == 1]
    return int(trainable.min()) if trainable.size else None


def staleness(oldest: int | None, version: int) -> int | None:
    """How many versions `oldest` lies behind `version`; None where there is no trainable token."""
    return None if oldest is None else version - oldest


def oldest_fresh(version: int, max_staleness: int) -> int:
    """The oldest version that `max_staleness` allows at `version`; older ones are stale."""
    return version - max_staleness


def fresh_mask(versions: NDArray[Any], loss_mask: NDArray[Any], version: int, max_staleness: int) -> NDArray[np.uint8]:
    """A new mask (uint8, one a token): 1 where the token is trainable and its version is not too old."""
    fresh: NDArray[np.bool_] = (loss_mask == 1) & (versions >= oldest_fresh(version, max_staleness))
    return fresh.astype(np.uint8)


def too_stale(versions: NDArray[Any], loss_mask: NDArray[Any], version: int, max_staleness: int, level: Level) -> bool:
    """Whether one rollout's staleness exceeds the bound; one without trainable tokens never does."""
    fresh, trainable = fresh_mask(versions, loss_mask, version, max_staleness), loss_mask == 1
    if level is Level.TOKEN:
        return bool(trainable.any() and not fresh.any())
    return bool((trainable & (fresh == 0)).any())
