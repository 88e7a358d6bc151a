"""What a training run that is killed by `test_kills.py` is to do."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from buffer import Fifo, FreshestFirst, StalestFirst
from producer import LongestPredictedFirst, SortedWindows

Way = Literal["strategies", "keep", "background", "manager"]

ORDERS = {"longest": LongestPredictedFirst(window=2), "windows": SortedWindows(prompts=5)}
POLICIES = {"fifo": Fifo, "freshest": FreshestFirst, "stalest": StalestFirst}


@dataclass(frozen=True)
class Task:
    """A task of the run: its dataset of `size` rows, how it is read, and how many groups of it make a batch."""

    name: str
    size: int
    batch_size: int
    shuffle: bool = False
    workers: int | None = None  # of a StatefulDataLoader; None reads the list itself
    rows_a_read: int | None = None  # its batch_size


@dataclass(frozen=True)
class Plan:
    """What a run does, JSON-able as a dict.

    Attributes:
        folder: of the checkpoint.
        url: of the database.
        seed: of the shuffles.
        way: how batches are made, see `kill_ways.py`.
        steps: batches of each task.
        every: a checkpoint and a commit each so many steps.
        over_issue: None makes every batch with `SyncProduceStrategy`; else with `AsyncProduceStrategy`, with this threshold, and those
            of all tasks at once; where `way` is "strategies", every other one.
        keep_tokens: partial rollouts.
        max_staleness: of the strategies, like the next four.
        order: of the samplers, a key of `ORDERS`; None is as drawn.
        judged_together: by a `group_reward`.
        mode: of updates of the weights in the background.
        tokens_per_second: of the engines; None is as fast as the machine.
        update_seconds: that an update of their weights takes.
        checkpoint_tokens: of the strategies; None checkpoints no running group.
        policy: which completed groups they take first where there is no bound, a key of `POLICIES`.
        future: of `resume`.
        lease: of the buffer. None is its default. With one, each process acts as one on a machine of its own: that it is dead
            is only known when its lease ends.
    """

    folder: str
    url: str
    tasks: tuple[Task, ...]
    seed: int = 0
    way: Way = "strategies"
    steps: int = 10
    every: int = 1
    over_issue: float | None = None
    keep_tokens: bool = True
    max_staleness: int | None = None
    on_stale: Literal["wait", "expire", "mask"] = "wait"
    tail: tuple[int, int] = (-1, 1)
    redundant: int = 0
    max_in_flight: int | None = None
    order: str | None = None
    judged_together: bool = False
    mode: Literal["keep", "abort", "wait"] = "keep"
    tokens_per_second: float | None = None
    update_seconds: float = 0.0
    checkpoint_tokens: int | None = None
    policy: str = "fifo"
    future: Literal["keep", "expire"] = "keep"
    lease: float | None = None

    @classmethod
    def of(cls, plan: dict[str, Any]) -> "Plan":
        """The plan that `asdict` took apart."""
        return cls(**plan | {"tasks": tuple(Task(**task) for task in plan["tasks"]), "tail": tuple(plan["tail"])})

    @property
    def members(self) -> int:
        """Of a group."""
        return 2 + self.redundant

    @property
    def total(self) -> int:
        """Groups of a step, of all tasks."""
        return sum(task.batch_size for task in self.tasks)

    @property
    def weights(self) -> dict[str, float]:
        """Of the tasks of a `TaskManager`."""
        return {task.name: 2.0 if task.shuffle else 1.0 for task in self.tasks}

    @property
    def waits(self) -> bool:
        """Whether batches wait for what would get too stale."""
        return self.max_staleness is not None and self.on_stale == "wait"


def as_arguments(plan: Plan) -> dict[str, Any]:
    """For `Zygote.start`."""
    return {"plan": asdict(plan)}
