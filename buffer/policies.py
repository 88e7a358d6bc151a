"""In which order completed groups are handed out. A policy is a value; the store turns it into ORDER BY."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fifo:
    """First completed, first handed out."""


@dataclass(frozen=True, slots=True)
class StalestFirst:
    """The group with the oldest trainable token first; ties by age."""


@dataclass(frozen=True, slots=True)
class FreshestFirst:
    """The group whose oldest trainable token is newest first; ties by age."""


TakePolicy = Fifo | StalestFirst | FreshestFirst
