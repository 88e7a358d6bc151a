"""The buffer beside its model: whatever is called, both answer the same and hold the same."""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffer import ReplayBuffer, RunReport
from buffer.asking import Transition
from buffer.export import read_groups
from buffer.status import Status
from tests.buffer.groups import url
from tests.buffer.model import commands, crash
from tests.buffer.model.commands import Command, Maker, World
from tests.buffer.model.described import described, of_file, same
from tests.buffer.model.reference import PROSE
from tests.buffer.model.reference_copies import Model

T = TypeVar("T")
MAX_CRASHES, LEASE = 3, 1e6
TASKS = ("math", "code")
STATUSES = st.lists(st.sampled_from(sorted(Status)), max_size=5)
SUFFIX = st.sampled_from(["jsonl", "jsonl.gz", "parquet"])
MEMORY = Path("/dev/shm")
"""Where there is one, files are kept in memory: processes die here, not the machine."""


class BufferMachine(RuleBasedStateMachine):
    """The buffer in `folder`, the model, and a producer's hand."""

    called: ClassVar[Counter[str]] = Counter()
    """How often each method of the buffer was called, over all runs."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.folders = 0
        self.files: list[tuple[Path, list[Any]]] = []

    @initialize()
    def begin(self) -> None:
        self.world = World(Model(MAX_CRASHES))
        self.folder = self.new_folder()
        self.folder.mkdir()
        self.open()

    def teardown(self) -> None:
        try:
            if hasattr(self, "buffer"):
                self.run(self.buffer.close())
        finally:
            self.loop.close()
            self.root.cleanup()

    # -- helpers ----------------------------------------------------------------------------------------------------

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def new_folder(self) -> Path:
        self.folders += 1
        return Path(self.root.name) / str(self.folders)

    def open(self) -> None:
        self.buffer = self.opened(self.folder)

    def opened(self, folder: Path) -> ReplayBuffer:
        buffer = ReplayBuffer.open(url(folder), max_crashes=MAX_CRASHES, lease=LEASE)
        # The thread that moves the log into the file would do so between the call and the copy: see `model/crash.py`.
        buffer._backend.committed = lambda: None  # type: ignore[method-assign]
        return self.run(buffer.__aenter__())

    @property
    def model(self) -> Model:
        return self.world.model

    @property
    def database(self) -> Path:
        return self.folder / "run.db"

    def draw(self, makers: Sequence[Maker], n: int, data: st.DataObject) -> list[Command]:
        self.world.draw = data.draw
        made = [data.draw(st.sampled_from(makers), label="what")(self.world) for _ in range(n)]
        return [command for command in made if command is not None]

    async def of_buffer(self, command: Command) -> Any:
        self.called[command.name] += 1
        found = await outcome(lambda: getattr(self.buffer, command.name)(*command.args, **command.options))
        if command.name in ("claim", "start", "draw_and_start") and isinstance(found, list):
            self.world.hand |= {group.group_id: group for group in found}
        return history(found) if command.name == "history" else described(found)

    def both(self, command: Command) -> None:
        expected = of_model(self.model, command)
        found = self.run(self.of_buffer(command))
        same(found, expected, command.name)

    # -- calls ------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), n=st.integers(1, 8))
    def call(self, data: st.DataObject, n: int) -> None:
        for _ in range(n):
            for command in self.draw(commands.ALL, 1, data):
                self.both(command)

    @rule(data=st.data(), n=st.integers(1, 8))
    def run_groups(self, data: st.DataObject, n: int) -> None:
        for _ in range(n):
            for command in self.draw(commands.RUNNING, 1, data):
                self.both(command)

    @rule(data=st.data(), n=st.integers(2, 5), moment=st.floats(0, 1))
    def call_at_once(self, data: st.DataObject, n: int, moment: float) -> None:
        """Several in one turn of the loop: in one transaction, or in a few. Killed meanwhile, the first of them are done."""
        self.world.ghosts = False
        todo = self.draw(commands.AT_ONCE, n, data)
        self.world.ghosts = True
        states, size = self.states(todo, at_once=True), self.log_size()
        expected = [of_model(state.copied(), command) for state, command in zip(states, todo, strict=False)]
        found = self.run(self.all_of(todo))
        # What is handed out is read later, when it may have changed.
        assert list(map(_error, found)) == list(map(_error, expected))
        self.world.model = states[-1]
        self.look_at_what_a_kill_leaves(size + int(moment * (self.log_size() - size)), states)

    async def all_of(self, todo: Sequence[Command]) -> list[Any]:
        async with asyncio.TaskGroup() as tasks:
            return [
                task.result() for task in [tasks.create_task(self.of_buffer(command)) for command in todo] if await asyncio.wait([task])
            ]

    def states(self, todo: Sequence[Command], *, at_once: bool = False) -> list[Model]:
        """The model before the first of these, and behind each."""
        states = [self.model]
        for command in todo:
            states.append(states[-1].copied())
            states[-1].clock -= at_once and len(states) > 2  # one time for all
            of_model(states[-1], command)
        return states

    def look_at_what_a_kill_leaves(self, size: int, states: Sequence[Model]) -> None:
        """One of the states, and whole. It is not gone on from: which one it is depends on the writer's haste."""
        folder = self.new_folder()
        crash.left_by_kill(self.database, size, folder)
        killed = self.opened(folder)
        try:
            found = self.run(everything(killed))
            assert found in [of_all(reopened(state)) for state in states], "a kill leaves what the first calls made, each whole"
        finally:
            self.run(killed.close())
            shutil.rmtree(folder)

    # -- dying ------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), n=st.integers(0, 4), done=st.integers(0, 4), moment=st.floats(0, 1, exclude_max=True))
    def die(self, data: st.DataObject, n: int, done: int, moment: float) -> None:
        """Killed when some calls had returned, in the middle of the next one: those are stored, and nothing of this one is."""
        todo = self.draw(commands.WRITING, n, data)
        states, sizes = self.states(todo), [self.log_size()]
        for command in todo:
            self.run(self.of_buffer(command))
            sizes.append(crash.log_size(self.database))
        done = min(done, len(todo))
        begun = sizes[min(done + 1, len(todo))] - sizes[done]
        folder = self.new_folder()
        crash.left_by_kill(self.database, sizes[done] + int(moment * begun), folder)
        self.run(self.buffer.close())
        self.folder = folder
        self.open()
        crash.empty_log(self.database)
        self.world.model = reopened(states[done])
        self.holds_all_of_it()

    def close_and_reopen(self) -> None:
        self.run(self.buffer.close())
        self.open()
        self.world.model = reopened(self.left_by_close())
        self.holds_all_of_it()

    def left_by_close(self) -> Model:
        return self.model

    def log_size(self) -> int:
        if crash.log_size(self.database) > crash.LONGEST:
            crash.empty_log(self.database)
        return crash.log_size(self.database)

    @rule(data=st.data(), maker=st.sampled_from([commands.take, commands.claim]))
    def cancel(self, data: st.DataObject, maker: Maker) -> None:
        """Whoever waits for groups is cancelled: they are given back."""
        (command,) = self.draw([maker], 1, data)
        groups = of_model(self.model, command, answer=False)
        self.run(self.cancelled(command))
        if isinstance(groups, list):
            self.model.give_back(groups) if command.name == "take" else self.model.release([g.group_id for g in groups])

    async def cancelled(self, command: Command) -> None:
        call = asyncio.create_task(outcome(lambda: getattr(self.buffer, command.name)(*command.args, **command.options)))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await self.buffer.cursor("math")  # behind what undoes it

    # -- copies -----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), what=st.sampled_from(["reopen", "export", "export", "import", "fork", "look", "look"]))
    def go_elsewhere(self, data: st.DataObject, what: str) -> None:
        match what:
            case "reopen":
                self.close_and_reopen()
            case "export":
                self.export(data.draw(st.sampled_from([None, *TASKS])), data.draw(STATUSES), data.draw(SUFFIX), data.draw(st.booleans()))
            case "import" if self.files:
                self.import_file(*self.files[data.draw(st.integers(0, len(self.files) - 1))])
            case "fork":
                self.fork(data.draw(st.integers(0, 6)), data.draw(st.booleans()))
            case "look":
                self.holds_all_of_it()
                self.changed_last()
                for maker in commands.ASKING:
                    self.both(*self.draw([maker], 1, data))

    def export(self, task: str | None, status: list[Status], suffix: str, elsewhere: bool) -> None:
        path = Path(self.root.name) / f"{len(self.files)}.{suffix}"
        groups = self.model.exported(task, status)
        assert self.run(self.buffer.export(path, task_name=task, status=status)) == len(groups)
        self.called["export"] += 1
        same(list(map(of_file, read_groups(path))), list(map(of_file, groups)), "the file")
        self.files.append((path, groups))
        if elsewhere:
            self.import_elsewhere(path, groups)

    def import_elsewhere(self, path: Path, groups: list[Any]) -> None:
        folder = self.new_folder()
        folder.mkdir()
        other, model = self.opened(folder), Model(MAX_CRASHES)
        self.called["import_file"] += 1
        try:
            assert self.run(outcome(lambda: other.import_file(path))) == of_model(model, Command("import_file", (groups,)))
            same(self.run(everything(other)), of_all(model), "imported")
        finally:
            self.run(other.close())

    def import_file(self, path: Path, groups: list[Any]) -> None:
        expected = of_model(self.model, Command("import_file", (groups,)))
        self.called["import_file"] += 1
        assert self.run(outcome(lambda: self.buffer.import_file(path))) == expected

    def fork(self, step: int, stay: bool) -> None:
        """Into a new run, and perhaps on with that one."""
        folder = self.new_folder()
        folder.mkdir()
        expected = of_model(self.model, Command("fork", (step,)), answer=False)
        found = self.run(outcome(lambda: self.buffer.fork(url(folder), step=step)))
        self.called["fork"] += 1
        if isinstance(expected, type):
            assert found == expected
            return
        report, model = expected
        assert found == report
        if not stay:
            self.run(self.buffer.close())
            self.folder, self.world.model = folder, reopened(model)
            self.open()
            self.holds_all_of_it()

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def the_same_groups(self) -> None:
        if hasattr(self, "buffer"):
            found = self.run(self.buffer.query(limit=10_000))
            same(described(found), described(self.model.query(limit=10_000)), "groups")

    def holds_all_of_it(self) -> None:
        same(self.run(everything(self.buffer)), of_all(self.model), "all")
        for name in everything_asked:
            self.called[name] += 1

    def changed_last(self) -> None:
        order = [self.model.groups[group.group_id].changed for group in self.run(self.buffer.query(order="changed", limit=10_000))]
        assert order == sorted(order, reverse=True)


def reopened(model: Model) -> Model:
    """The model, when another process has opened what this one left."""
    other = model.copied()
    other.clock += 1
    other.reopened()
    return other


def of_model(model: Model, command: Command, *, answer: bool = True) -> Any:
    """What the model answers, of errors their class."""
    model.clock += 1
    try:
        found = getattr(model, command.name)(*command.args, **command.options)
    except Exception as error:  # noqa: BLE001 - compared with the buffer's
        return type(error)
    return described(found) if answer else found


async def outcome(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What comes of it; of an error its class."""
    try:
        return await call()
    except Exception as error:  # noqa: BLE001 - compared with the model's
        return type(error)


def _error(answer: Any) -> Any:
    return answer if isinstance(answer, type) else None


def history(found: Any) -> Any:
    """Without what the model does not know: when, by whom, in which words."""
    if isinstance(found, type):
        return found
    return [_change(transition) for transition in found]


_WORDS = ("rewound", "it ran elsewhere", "sampled by weights", "too stale", "released", "its ")


def _change(transition: Transition) -> Any:
    assert transition.owner
    reason = transition.reason
    prose = reason is not None and reason.startswith(_WORDS)
    return transition.source, transition.target, transition.step, transition.version, PROSE if prose else reason


everything_asked = (
    "query",
    "audit",
    "task_names",
    "pruned_to",
    "last_step",
    "next_step",
    "recorded_steps",
    "cursor",
    "counts",
    "history",
    "overview",
    "account",
    "report",
)


def _wasted(told: RunReport, task: str, why: str) -> int:
    return sum(step.wasted.get(why, 0) for step in (*told.steps, *told.since) if step.task_name == task)


async def everything(buffer: ReplayBuffer) -> Any:
    """All that can be asked of a buffer, that goes with a whole audit."""
    report, overview = await buffer.audit(payloads=True), await buffer.overview()
    assert report.ok, report.problems
    groups = await buffer.query(limit=10_000)
    tasks = await buffer.task_names()
    told = await buffer.report(points=10_000)
    return {
        "groups": described(groups),
        "history": {group.group_id: history(await buffer.history(group.group_id)) for group in groups},
        "audit": (report.drawn, report.counts, report.pruned),
        "overview": {name: (task.drawn, task.pruned, task.last_step, task.counts) for name, task in overview.tasks.items()},
        "rewinds": [rewind.version for rewind in overview.rewinds],
        "committed": overview.committed_step,
        "tasks": tasks,
        "accounts": {task: await buffer.account(task) for task in tasks},
        "batches": [(step.task_name, step.first, step.version, step.groups) for step in told.steps],
        "useless": {task: [_wasted(told, task, why) for why in USELESS] for task in tasks},
        "run": (await buffer.pruned_to(), await buffer.last_step()),
        "cursors": [await buffer.cursor(task) for task in TASKS],
        "steps": [(await buffer.last_step(task), await buffer.next_step(task), await buffer.recorded_steps(task)) for task in TASKS],
        "counts": [await buffer.counts(task) for task in TASKS],
    }


USELESS = ("filtered", "failed", "discarded")


def of_all(model: Model) -> Any:
    """What `everything` must say."""
    groups = model.query(limit=10_000)
    tasks = model.task_names()
    return {
        "groups": described(groups),
        "history": {group.group_id: model.history(group.group_id) for group in groups},
        "audit": tuple({task: answer(task) for task in tasks} for answer in (model.drawn, model.counts, model.pruned)),
        "overview": {task: (model.drawn(task), model.pruned(task), model.last_step(task), model.counts(task)) for task in tasks},
        "rewinds": list(model.forks),
        "committed": model.committed,
        "tasks": tasks,
        "accounts": {task: model.account(task) for task in tasks},
        "batches": [(task, batch.step, batch.version, batch.groups) for task in tasks for batch in model.recorded_steps(task)],
        "useless": {task: [model.account(task).wasted[why] for why in USELESS] for task in tasks},
        "run": (model.pruned_to(), model.last_step()),
        "cursors": [model.cursor(task) for task in TASKS],
        "steps": [(model.last_step(task), model.next_step(task), model.recorded_steps(task)) for task in TASKS],
        "counts": [model.counts(task) for task in TASKS],
    }
