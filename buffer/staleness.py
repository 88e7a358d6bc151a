"""How stale tokens are: the one definition, used to expire groups, to mask tokens and in metrics. Pure functions of arrays.

Staleness is the current version minus the oldest version among the trainable tokens: of a rollout over its own tokens,
of a group the maximum over its members. Without a trainable token there is nothing that could be stale: None. It is
negative where the policy went back to an earlier version than the tokens', and no bound is exceeded then.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_VERSION = 2**62
"""Stands where there is no trainable token: it sorts behind all versions and is never stale."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run's timeline: the versions to which its rewinds went back, in order."""

    forks: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        """How many rewinds there were."""
        return len(self.forks)


class Level(StrEnum):
    """What makes a member too stale: one stale trainable token ("sequence"), or no fresh one beside them ("token")."""

    SEQUENCE = "sequence"
    TOKEN = "token"


def oldest_version(versions: NDArray[Any], loss_mask: NDArray[Any]) -> int | None:
    """The oldest version among the trainable tokens (mask 1) of one rollout; None where there is none."""
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
