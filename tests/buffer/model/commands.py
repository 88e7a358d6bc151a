"""Calls of `ReplayBuffer`'s methods that make sense of what the model holds, or almost: refused ones too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from buffer import DrawnRow, Fifo, FreshestFirst, Position, RolloutGroup, RolloutState, StalestFirst, Status
from buffer.sharing import Share
from buffer.status import CLAIMABLE, GROUP_WIDE
from tests.buffer.groups import a_group, fill
from tests.buffer.model.reference_copies import Model

S = Status
TASKS = ["math", "code"]
TASK = st.sampled_from(TASKS)
STEP = st.integers(1, 7)
VERSION = st.integers(0, 6)
POLICY = st.sampled_from([None, Fifo(), StalestFirst(), FreshestFirst()])
REWARD = st.sampled_from([-1.0, 0.0, 0.25, 1.0])


class Command(NamedTuple):
    """A method of the buffer, and what it is given."""

    name: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}


@dataclass
class World:
    """What commands are drawn from: the model, and the groups that the buffer handed out to be run."""

    model: Model
    hand: dict[int, RolloutGroup] = field(default_factory=dict)
    draw: Any = None
    ghosts: bool = True
    """Whether groups that were taken from their producer may be stored all the same."""

    def a_known(self) -> int | None:
        return self.draw(st.sampled_from(sorted(self.model.groups))) if self.model.groups else None


Maker = Callable[[World], Command | None]


# -- producing ------------------------------------------------------------------------------------------------------


def draw(w: World, name: str = "draw") -> Command:
    task, n = w.draw(TASK), w.draw(st.integers(0, 3))
    moves = w.model.cursor(task).moves
    at = 10 * moves
    rows = [_row(w, task, at + offset) for offset in range(n)]
    stranger, again = w.draw(st.integers(0, 9)) == 9, w.draw(st.integers(0, 9)) == 9
    if rows and again:
        rows[-1] = _row(w, task, 0)  # perhaps a prompt that is there already
    return Command(name, (task, rows), {"group_size": 2, "moves": moves + stranger, "cursor": {"offset": at, "seed": [1, None]}})


def draw_and_start(w: World) -> Command:
    return draw(w, "draw_and_start")


def _row(w: World, task: str, offset: int) -> DrawnRow:
    prompt = {"prompt": f"{task} ⅔ {offset}"}
    chat = {"messages": [{"role": "user", "content": f"{offset}?"}], "sampling": {"n": offset}}
    tokens = {"prompt_ids": [1, 2, offset], "level": 0.5}
    row = w.draw(st.sampled_from([prompt, chat, tokens, {"question": "2+2?"}]))
    return DrawnRow(row, Position(0, offset), "No prompt" if "question" in row else None)


def claim(w: World) -> Command:
    statuses = w.draw(st.lists(st.sampled_from(sorted(CLAIMABLE)), min_size=1, max_size=4))
    exclude = w.draw(st.sets(st.sampled_from(sorted(w.model.groups)), max_size=3)) if w.model.groups else set()
    order = w.draw(st.sampled_from(["oldest", "most_interrupted"]))
    options = {"statuses": statuses, "exclude": exclude, "order": order}
    if w.model.groups and w.draw(st.integers(0, 3)) == 3:
        options["among"] = w.draw(st.lists(st.sampled_from(sorted(w.model.groups)), max_size=4, unique=True))
    return Command("claim", (w.draw(TASK), w.draw(st.integers(0, 4))), options)


def start(w: World) -> Command:
    waiting = sorted(group_id for group_id, known in w.model.groups.items() if known.status in CLAIMABLE)
    some = w.draw(st.lists(st.sampled_from(waiting), unique=True, max_size=3)) if waiting else []
    other = w.a_known() if w.draw(st.integers(0, 9)) == 9 else None
    return Command("start", (some if other is None or other in some else [*some, other],))


def release(w: World) -> Command:
    running = w.model.running()
    some = w.draw(st.lists(st.sampled_from(running), unique=True, max_size=2)) if running else []
    return Command("release", (some if w.draw(st.integers(0, 19)) else [*some, 10**6],))


def work(w: World) -> Command | None:
    """What a loop does to a group that it runs, or ran before it was taken from it; the buffer hears nothing of it."""
    if (group := _in_hand(w, running=True)) is not None:
        for _ in range(w.draw(st.integers(1, 3))):
            change(w, group.rollouts[w.draw(st.integers(0, len(group.rollouts) - 1))])
    return None


def change(w: World, rollout: RolloutState) -> None:
    match w.draw(st.sampled_from(["sample", "sample", "sample", "observe", "finish", "finish", "fail", "reset", "speak", "measure"])):
        case "sample":
            n = w.draw(st.integers(1, 4))
            rollout.append(range(n), logprobs=[-0.5] * n, version=w.draw(st.lists(VERSION, min_size=n, max_size=n)))
        case "observe":
            rollout.append([7], logprobs=[np.nan], trainable=False, version=w.draw(VERSION))
        case "finish":
            rollout.status, rollout.finish_reason, rollout.text = S.COMPLETED, "stop", "größer"
            rollout.score = rollout.reward = w.draw(REWARD)
            rollout.error = None
        case "fail":
            rollout.status, rollout.error, rollout.attempts = S.FAILED, "TimeoutError: Über 30 %_ s", rollout.attempts + 1
        case "reset":
            rollout.reset()
            rollout.status = S.RUNNING
        case "speak":
            rollout.messages = [*(rollout.messages or []), {"role": "tool", "content": "4"}]
        case "measure":
            rollout.metrics = {**rollout.metrics, "turns": w.draw(REWARD)}
            rollout.reward_parts = {"format": 0.5}


def _in_hand(w: World, *, running: bool) -> RolloutGroup | None:
    held = [group_id for group_id in w.model.running() if group_id in w.hand] if running or not w.ghosts else sorted(w.hand)
    return w.hand[w.draw(st.sampled_from(held))] if held else None


def checkpoint(w: World) -> Command | None:
    group = _in_hand(w, running=w.draw(st.integers(0, 9)) < 9)
    return None if group is None else Command("checkpoint", (group,))


def put_result(w: World) -> Command | None:
    group = _in_hand(w, running=w.draw(st.integers(0, 9)) < 9)
    if group is None:
        return None
    outcome = w.draw(st.sampled_from([S.COMPLETED, S.COMPLETED, S.COMPLETED, S.INTERRUPTED, S.FAILED, S.FILTERED, S.RUNNING]))
    for rollout in group.rollouts:
        if outcome in (S.COMPLETED, S.FILTERED) and not rollout.response_ids.size:
            rollout.append([3, 4], logprobs=[-1, -2], version=w.draw(VERSION))
            rollout.reward = w.draw(REWARD)
        if outcome is not S.RUNNING and (rollout.status is not S.COMPLETED):
            rollout.status = S.COMPLETED if outcome is S.FILTERED else outcome
            rollout.error = "ValueError: 100%" if outcome is S.FAILED else rollout.error
    if outcome is S.FILTERED:
        group.mark(outcome, reason="all the same")
    return Command("put", (group,))


# -- by hand --------------------------------------------------------------------------------------------------------

_NEW = st.sampled_from([S.PENDING, S.COMPLETED, S.COMPLETED, S.INTERRUPTED, S.EXPIRED, S.FAILED, S.FILTERED, S.RUNNING, S.ARCHIVED])


def put_new(w: World) -> Command:
    jump, status = w.draw(st.integers(1, 4)), w.draw(_NEW)
    timeline = w.draw(st.sampled_from([type(w.model.timeline)(), w.model.timeline]))
    group = a_group(w.model.last_id + jump, status, task_name=w.draw(TASK), version=w.draw(VERSION), timeline=timeline)
    return Command("put", (group,))


def put_over(w: World) -> Command | None:
    if (group_id := w.a_known()) is None:
        return None
    if w.draw(st.integers(0, 9)) == 9:
        return Command("put", (a_group(group_id, task_name="math", size=3),))  # another group with its id
    group, status = w.model.load(group_id), w.draw(st.sampled_from(sorted(S)))
    for rollout in group.rollouts:
        rollout.reset()
        fill(rollout, version=2)
        rollout.status = S.COMPLETED if status in GROUP_WIDE else status
    if status in GROUP_WIDE:
        group.mark(status)
    return Command("put", (group,))


def put_restored(w: World) -> Command:
    groups = []
    for n in range(w.draw(st.integers(0, 2))):
        status = w.draw(st.sampled_from([S.COMPLETED, S.CONSUMED, S.ARCHIVED, S.PENDING, S.RUNNING]))
        group = a_group(
            w.model.last_id + n + w.draw(st.integers(0, 9) | st.just(1)), status, task_name=w.draw(TASK), version=w.draw(VERSION)
        )
        group.consumed_step = w.draw(STEP) if status in (S.CONSUMED, S.ARCHIVED) else None
        groups.append(group)
    return Command("put_restored", (groups,))


# -- training -------------------------------------------------------------------------------------------------------


def take(w: World) -> Command:
    step = w.model.next_step("math") if w.draw(st.booleans()) else w.draw(STEP)
    options = {"step": step, "version": w.draw(st.none() | VERSION), "policy": w.draw(POLICY)}
    options |= {"oldest_version": w.draw(st.none() | VERSION.map(lambda version: version - 1)), "whole": w.draw(st.booleans())}
    return Command("take", (w.draw(TASK), w.draw(st.integers(0, 4))), options)


def take_together(w: World) -> Command:
    parts = [(w.draw(st.integers(0, 2)), task) for task in w.draw(st.permutations(TASKS))]
    parts = parts if any(n for n, _ in parts) else [(1, TASKS[0])]
    shares = [Share(task, float(n + 1), n, n / 8) for n, task in parts]
    options = {"step": w.model.next_step("math"), "version": w.draw(st.none() | VERSION)}
    return Command(
        "take_together", (shares,), options | {"oldest_versions": w.draw(st.none() | st.dictionaries(st.sampled_from(TASKS), VERSION))}
    )


def shares(w: World) -> Command:
    return Command("shares", (), {"before": w.draw(st.integers(0, 9))})


def shared_tasks(w: World) -> Command:
    return Command("shared_tasks", ())


def check_take(w: World) -> Command:
    return Command("check_take", (w.draw(TASK), w.draw(STEP)))


def commit(w: World) -> Command:
    return Command("commit", (w.draw(st.integers(0, 5)),), {"version": w.draw(st.none() | VERSION)})


def resume(w: World) -> Command:
    committed = w.model.committed or 0
    step = w.draw(st.sampled_from([committed, committed, committed + 1, max(0, committed - 1), 5]))
    return Command("resume", (step,), {"future": w.draw(st.sampled_from(["keep", "keep", "expire"]))})


def expire(w: World) -> Command:
    options = {
        "version": w.draw(VERSION),
        "max_staleness": w.draw(st.integers(0, 4)),
        "level": w.draw(st.sampled_from(["sequence", "token"])),
    }
    return Command("expire", (w.draw(TASK),), options)


def prune(w: World) -> Command:
    name = w.draw(st.sampled_from(["keep_steps", "keep_last", "max_bytes"]))
    return Command("prune", (), {name: w.draw(st.integers(0, 500) if name == "max_bytes" else st.integers(0, 3))})


def prune_rows(w: World) -> Command:
    return Command("prune", (), {"rows": True, "keep_last": w.draw(st.none() | st.integers(0, 2))})


# -- asking ---------------------------------------------------------------------------------------------------------


def query(w: World) -> Command:
    filters = w.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "task_name": TASK,
                "status": st.lists(st.sampled_from(sorted(S)), max_size=4),
                "step": STEP,
                "min_version": st.integers(0, 3),
                "max_version": st.integers(3, 6),
                "min_reward": st.sampled_from([-1.0, 0.0, 0.25]),
                "max_reward": st.sampled_from([0.25, 1]),
                "error": st.sampled_from(["error", "TIMEOUT", "%", "30 %_", "", "no prompt"]),
                "min_attempts": st.integers(0, 2),
                "min_age": st.sampled_from([0, 1e6]),
                "max_age": st.just(1e6),
            },
        )
    )
    page = w.draw(st.fixed_dictionaries({}, optional={"limit": st.integers(0, 5), "offset": st.integers(0, 5)}))
    order = w.draw(st.sampled_from(["oldest", "newest", "stalest", "best", "worst"]))
    if order == "stalest":
        filters["status"] = w.draw(st.lists(st.sampled_from([S.COMPLETED, S.INTERRUPTED, S.RUNNING, S.CONSUMED]), min_size=1))
    return Command("query", (), {**filters, **page, "order": order})


def get(w: World) -> Command:
    return Command("get", ((w.a_known() if w.draw(st.integers(0, 9)) < 9 else None) or 10**6,))


def count(w: World) -> Command:
    return Command("count", (w.draw(TASK), w.draw(st.sampled_from(sorted(S)))))


def tail_candidates(w: World) -> Command:
    return Command("tail_candidates", (w.draw(TASK), w.draw(st.integers(0, 3))))


def oldest_versions(w: World) -> Command:
    return Command("oldest_versions", (w.draw(TASK),))


def positions(w: World) -> Command:
    return Command("positions", (w.draw(TASK), w.draw(st.sampled_from(sorted(S)))), {"limit": w.draw(st.integers(0, 5))})


def response_lengths(w: World) -> Command:
    known = sorted({known.position for known in w.model.groups.values() if known.position is not None})
    some = w.draw(st.lists(st.sampled_from([*known, Position(7, 7)]), max_size=6))
    return Command("response_lengths", (w.draw(TASK), some))


def account(w: World) -> Command:
    return Command("account", (w.draw(TASK),), {"window": w.draw(st.integers(0, 3))})


def lengths_by_prompt(w: World) -> Command:
    return Command("lengths_by_prompt", (w.draw(TASK),))


def wait_for(w: World) -> Command:
    task, status, n = w.draw(TASK), w.draw(st.sampled_from(sorted(S))), w.draw(st.integers(1, 3))
    return Command("wait_for", (task, status, n), {"timeout": 60.0 if w.model.count(task, status) >= n else 0.001})


def history(w: World) -> Command:
    return Command("history", get(w).args)


WRITING: Sequence[Maker] = [
    *(draw, draw_and_start, claim, claim, start, release, checkpoint, put_result, put_result, put_new, put_over),
    *(take, take, take_together, commit, resume, expire, prune, put_restored),
]
"""Each is one transaction, or none."""

AT_ONCE: Sequence[Maker] = [maker for maker in WRITING if maker not in (put_over, put_new, put_restored, resume, prune)]
"""Those that callers who do not know of each other may well ask for at once."""

RUNNING: Sequence[Maker] = [
    draw,
    draw_and_start,
    claim,
    claim,
    start,
    work,
    work,
    work,
    work,
    checkpoint,
    checkpoint,
    put_result,
    put_result,
    release,
    resume,
    take,
    take_together,
]

ASKING: Sequence[Maker] = [
    check_take,
    shares,
    shared_tasks,
    query,
    get,
    history,
    count,
    account,
    tail_candidates,
    oldest_versions,
    positions,
    response_lengths,
    lengths_by_prompt,
    wait_for,
]

ALL: Sequence[Maker] = [*WRITING, work, prune_rows, query, *ASKING]
