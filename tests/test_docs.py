"""Shows that README and docs say what is true: every block runs, every output is as printed, every table and link agrees with the code.

How blocks are run, one page after the other, each in a folder of its own where the blocks of the page share files and names:

- `python` runs in the page's namespace, with top-level `await`; `python run.py` writes the block to that file instead.
- `bash` runs, `millrace` as pip would install it, except for `make`, `pip` and paths of the repository: of those the targets,
  extras and files must exist.
- `sql` runs against the page's run.db, or else against that of a small run made here.
- `text` is what the block right above it prints, but for spaces at the ends of lines; `...` stands for anything.
- A block without a language is a drawing.

Names that a page takes from its reader (a trainer, a model) are made in `READERS` below, by page.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import agent_loop
import agent_loop.errors
import agent_loop.testing
import buffer
import buffer.errors
import producer
import producer.errors
import producer.experience
from agent_loop import Capabilities, Engine, RewardFunction, RewardSet, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines import offers
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.sampling import STRUCTURES
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.schema import metadata
from buffer.status import TRANSITIONS
from producer import ProducedBatch, ReplayPromptSampler, SyncProduceStrategy
from producer.experience import KL, AdvantageConfig, Attached, OffPolicy, batch_statistics, make_experience
from producer.experience.off_policy import CORRECTIONS
from producer.members import SURPLUS
from tests import postgres

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"python", "bash", "sql", "text", ""}


@dataclass(frozen=True)
class Block:
    """A fenced block: language, what follows it on the fence (a file name), content, first line, and whether it follows another at once."""

    page: Path
    language: str
    file: str
    content: str
    line: int
    after_block: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[Block]:
    text, end, blocks = page.read_text(), -1, list[Block]()
    for found in FENCE.finditer(text):
        at_once = end >= 0 and not text[end : found.start()].strip()
        line = text.count("\n", 0, found.start()) + 2
        blocks.append(Block(page, found[1], found[2], found[3], line, at_once))
        end = found.end()
    return blocks


# --- what readers bring


async def training(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A trainer over a small model and its prompts: the demo's, without its warm-up."""
    patch.syspath_prepend(str(ROOT / "examples"))
    trainer_module = importlib.import_module("arithmetic_trainer")
    trainer = trainer_module.Trainer(folder)
    dataset = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    return {"trainer": trainer, "tokenizer": trainer.tokenizer, "dataset": dataset, "steps": 2}


async def tiny_model(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model in Hugging Face's format, as a folder."""
    from tests.tiny_model import make_tiny_model

    return {"model": make_tiny_model(folder / "model"), "trained": make_tiny_model(folder / "trained", seed=1)}


async def reward_model(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A sequence classifier in Hugging Face's format, as a folder."""
    from tests.tiny_model import make_tiny_classifier

    return {"reward_model": make_tiny_classifier(folder / "reward_model")}


async def tiny_adapter(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model and an adapter for it, as folders."""
    from tests.tiny_adapter import make_tiny_adapter

    made = await tiny_model(folder, patch)
    return made | {"adapter": make_tiny_adapter(folder / "adapter", made["model"], seed=1)}


async def training_with_trl(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model and prompts, for a trainer that asks no server."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"):
        patch.setenv(name, "1")
    return await tiny_model(folder, patch) | {"dataset": [{"prompt": f"What is {a} + {a}?"} for a in range(20)]}


async def two_servers(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two vLLM servers, simulated, and a folder of weights for them."""
    from tests.engines.simulated_server import SimulatedServer, write_weights

    servers = [SimulatedServer() for _ in range(2)]
    for server in servers:
        await server.start()
    return {"servers": servers, "urls": [server.url for server in servers], "weights": write_weights(folder, 1)}


async def small_run(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """run.db in the page's folder, as a run with failures leaves it."""
    await make_run(folder / "run.db")
    return {}


READERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Awaitable[dict[str, Any]]]] = {
    "README.md": training,
    "docs/how-to/choose-an-engine.md": tiny_model,
    "docs/how-to/combine-rewards.md": reward_model,
    "docs/how-to/export-and-replay.md": small_run,
    "docs/how-to/use-tools.md": tiny_model,
    "docs/how-to/use-vllm.md": tiny_model,
    "docs/how-to/sample-without-a-trainer.md": tiny_model,
    "docs/how-to/look-into-a-run.md": small_run,
    "docs/how-to/report-on-a-run.md": small_run,
    "docs/how-to/score-log-probabilities.md": tiny_model,
    "docs/how-to/resume-a-run.md": small_run,
    "docs/how-to/serve-with-vllm.md": two_servers,
    "docs/how-to/simulate-a-run.md": small_run,
    "docs/how-to/use-adapters.md": tiny_adapter,
    "docs/how-to/train-with-trl.md": training_with_trl,
}


def score(state: RolloutState) -> float:
    return float(state.response_ids.size % 2)


def only_long(group: RolloutGroup) -> str | None:
    return "row 3 is not wanted" if group.rollouts[0].row["number"] == 3 else None


async def make_run(path: Path) -> ProducedBatch:
    """A database with groups of many statuses: two steps, the first committed, a bad row, a filtered group, and one left running."""
    rows: list[Any] = [{"prompt_ids": [1 + number, 5], "number": number} for number in range(40)]
    rows[5] = {"answer": "a row without a prompt"}
    async with ReplayBuffer.open(f"sqlite:///{path}") as store, SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=score, sampling=SamplingParams(max_tokens=16, seed=1))
        sampler = ReplayPromptSampler(rows, store, group_size=4, shuffle=False, on_bad_row="fail")
        strategy = SyncProduceStrategy(store, group_filter=only_long, progress=False)
        await strategy.produce_batch(loop, sampler, 4, "demo", step=1)
        await store.commit(step=1)
        await engine.update_weights({"seed": 1}, version=1)
        batch = await strategy.produce_batch(loop, sampler, 4, "demo", step=2)
        waiting = await sampler.sample_many("demo", 2, buffer=store)
        await store.put(await loop.generate_group(waiting[0]))
        return batch


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProducedBatch]:
    """A small run's database and its last batch."""
    path = tmp_path_factory.mktemp("run") / "run.db"
    return path, await make_run(path)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's commands, each as pip makes it."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, function = target.split(":")
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        script.chmod(0o755)
    return folder


@pytest_asyncio.fixture
async def names(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: Path
) -> AsyncIterator[dict[str, Any]]:
    """The namespace of a page, in its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]]))
    page = request.node.callspec.params["page"]
    reader = READERS.get(page)
    own: dict[str, Any] = {"__name__": "docs"}
    if "postgresql" in page:
        server: postgres.Server = request.getfixturevalue("server")
        own["url"] = postgres.schema_url(server.address, tmp_path, "run.db")
    own |= {} if reader is None else await reader(tmp_path, monkeypatch)
    yield dict(own)
    for started in own.get("servers", ()):
        await started.kill()


# --- running blocks


@pytest.mark.parametrize("page", [name for name, page in zip(NAMES, PAGES, strict=True) if blocks_of(page)])
async def test_every_block_runs(page: str, names: dict[str, Any], tmp_path: Path, run: tuple[Path, ProducedBatch]) -> None:
    printed: str | None = None
    for block in blocks_of(ROOT / page):
        assert block.language in LANGUAGES, f"{block.place}: blocks in {block.language!r} are not run; see the top of this file"
        if block.language == "text":
            assert block.after_block, f"{block.place}: no block right above it printed this"
            assert_printed(block, printed)
            printed = None
        elif block.language == "python":
            printed = await run_python(block, names)
        elif block.language == "bash":
            printed = run_bash(block)
        elif block.language == "sql":
            own = tmp_path / "run.db"
            printed = run_sql(block, own if own.exists() else run[0])


async def run_python(block: Block, names: dict[str, Any]) -> str:
    # Line numbers of the page, so that a traceback points into it.
    source = "\n" * (block.line - 1) + block.content
    code = compile(source, str(block.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if block.file:
        save(block)
        return ""
    assert "__main__" not in block.content, f"{block.place}: a script needs a file name behind ```python, and a bash block that runs it"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = eval(code, names)  # noqa: S307 - the pages of this repository
        if code.co_flags & inspect.CO_COROUTINE:
            await result
    return out.getvalue()


def save(block: Block) -> None:
    Path(block.file).write_text(block.content)


def run_bash(block: Block) -> str | None:
    """Run the block, unless it is one whose commands are only looked up; what it printed."""
    checked = [line_is_real(block, line) for line in commands(block)]
    if all(checked):
        return None
    assert not any(checked), f"{block.place}: split the block: some of its lines are run, some only looked up"
    done = subprocess.run(["bash", "-ec", block.content], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{block.place}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(block: Block) -> list[list[str]]:
    lines = block.content.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def line_is_real(block: Block, words: list[str]) -> bool:
    """Whether the line is one that is not run but looked up; fails if what it names does not exist."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["make", *arguments]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            variables = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
            for argument in arguments:
                assert argument in targets or argument.partition("=")[0] in variables, f"{block.place}: make has no {argument}"
        case ["pip", "install", *arguments]:
            for argument in arguments:
                assert_installable(block, argument)
        case ["python", "-m", "pytest", *_, path] if not Path(path).exists():
            assert (ROOT / path).exists(), f"{block.place}: there is no {path}"
        case ["python", path, *_] if path != "-m" and not Path(path).exists():
            assert (ROOT / path).is_file(), f"{block.place}: there is no {path}"
        case ["python" | "millrace", *_]:
            return False
        case ["timeout", "--signal", "INT", _, *command]:
            return line_is_real(block, command)
        case _:
            pytest.fail(f"{block.place}: no rule says how {shlex.join(words)} is checked; add one to this file")
    return True


def assert_installable(block: Block, argument: str) -> None:
    """Of `pip install`: this folder with extras that exist, a file, or a package that the project names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = " ".join([*project["dependencies"], *(one for extra in extras.values() for one in extra)])
    if found := re.fullmatch(r"(?:\.|millrace)(?:\[(.*)\])?", argument):
        wanted = set((found[1] or "").split(",")) - {""}
        assert wanted <= set(extras), f"{block.place}: extras {wanted - set(extras)} do not exist"
    elif (ROOT / argument).is_file() or argument in ("-r", "-e"):
        return
    else:
        assert re.search(rf"\b{re.escape(argument)}\b", named), f"{block.place}: {argument} is no dependency of the project"


def run_sql(block: Block, database: Path) -> str:
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    with contextlib.closing(connection):
        rows = [row for statement in block.content.split(";") if statement.strip() for row in connection.execute(statement)]
    return "".join("|".join("" if value is None else str(value) for value in row) + "\n" for row in rows)


def assert_printed(block: Block, printed: str | None) -> None:
    assert printed is not None, f"{block.place}: the block above it is not run, so its output cannot be known"
    pattern = ".*".join(map(re.escape, block.content.strip().split("...")))
    printed = re.sub(r" +$", "", printed, flags=re.MULTILINE)
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{block.place} says\n{block.content}\nand printed was\n{printed}"


# --- tables and links agree with the code


def table(page: str, heading: str | None = None) -> list[list[str]]:
    """The cells of the page's first table, or of the first one below a heading; without the head."""
    text = (ROOT / "docs" / page).read_text()
    if heading is not None:
        text = text[re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE).end() :]  # type: ignore[union-attr]  # absent: a failure
    lines = dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = list(takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows[2:]]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_statuses_and_transitions_are_those_of_the_code() -> None:
    documented = {status: set(code(goes_to)) for (status,), goes_to in ((code(row[0]), row[2]) for row in table("reference/statuses.md"))}
    assert documented == {status.value: {target.value for target in targets} for status, targets in TRANSITIONS.items()}


async def test_metrics_of_a_batch_are_those_it_has(tmp_path: Path) -> None:
    documented = {name for row in table("reference/metrics.md", "Of a batch") for name in code(row[0])}
    given = await metrics_of_ten_steps(tmp_path / "run.db")
    found = {re.sub(r"^(filtered|failed)/.*", r"\1/<reason>", name) for name in given}
    assert documented == {re.sub(r"^(batch/\w+)/(first|second|third)", r"\1/<function>", name) for name in found}


async def metrics_of_ten_steps(path: Path) -> set[str]:
    """All that any batch of a run has that is long enough for each of them; some of its groups fail, and one is filtered."""

    def some_fail(state: RolloutState) -> float:
        return 1 / (state.row["number"] % 5)

    def seldom(state: RolloutState) -> float | None:
        return 1 / state.index if state.row["number"] % 2 else None

    functions = {
        "first": RewardFunction(some_fail),
        "second": RewardFunction(seldom, on_error="skip"),
        "third": RewardFunction(seldom, on_error=0.0),
    }

    rows = [{"prompt_ids": [1 + number, 5], "number": number} for number in range(40)]
    async with ReplayBuffer.open(f"sqlite:///{path}") as store, SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=RewardSet(functions), sampling=SamplingParams(max_tokens=4), max_attempts=1)
        sampler = ReplayPromptSampler(rows, store, group_size=2, shuffle=False)
        strategy = SyncProduceStrategy(store, group_filter=only_long, max_failed=9, progress=False)
        batches = [await strategy.produce_batch(loop, sampler, 1, "demo") for _ in range(10)]
    return {name for batch in batches for name in batch.metrics}


async def test_the_account_is_told_name_by_name(run: tuple[Path, ProducedBatch]) -> None:
    documented = {name for row in table("reference/metrics.md", "Of a run") for name in code(row[0])}
    async with ReplayBuffer.open(f"sqlite:///{run[0]}", read_only=True) as store:
        account = await store.account("demo")
    undocumented = {"cohort", "untrained", "window"}  # what the bias of coverage is made of
    assert documented == {name for name in dir(account) if not name.startswith("_")} - undocumented
    page = (ROOT / "docs/reference/metrics.md").read_text()
    reasons = page[page.index("Tokens are wasted for one of these reasons") : page.index("What a killed process decoded")]
    assert re.findall(r"^\| `(\w+)` \|", reasons, re.MULTILINE) == list(account.wasted)


async def test_metrics_of_an_experience_are_those_it_has(run: tuple[Path, ProducedBatch]) -> None:
    documented = {name for row in table("reference/metrics.md", "Of an experience") for name in code(row[0])}
    lacking: list[dict[str, Any]] = [
        {"reward": None, "error": "it failed"},
        {"reward": None, "error": SURPLUS},
        {"reward": None},
        {"reward": float("nan")},
        {"prompt_ids": None},
        {"response_ids": None},
        {"loss_mask": [0, 0]},
    ]
    rollouts = [rollout_with(index, fields) for index, fields in enumerate([{}, *lacking])]
    assert documented == set(make_experience([RolloutGroup(1, rollouts)]).metrics)


def test_statistics_of_a_batch_are_those_it_has() -> None:
    documented = {name for row in table("reference/metrics.md", "By task and by version") for name in code(row[0])}
    group = RolloutGroup(1, [rollout_with(index, {"reward": float(index)}) for index in range(2)])
    experience = make_experience([group], attached=Attached(reference={rollout.rollout_id: [-0.4, -0.6] for rollout in group.rollouts}))
    found = batch_statistics(experience, current=experience.logprobs).by_task["default"]
    assert documented == {re.sub(r"/(mean|std|min|max)$", "/<spread>", name) if not name.startswith("kl/") else name for name in found}


def rollout_with(index: int, fields: dict[str, Any]) -> RolloutState:
    whole = {"reward": 1.0, "score": 1.0, "prompt_ids": [1, 2], "response_ids": [3, 4], "loss_mask": [1, 1]} | fields
    size = 2 if whole["response_ids"] else 0
    arrays = {"logprobs": [-0.5] * size, "versions": [0] * size, "loss_mask": whole["loss_mask"][:size]}
    return RolloutState(1, index, "default", Status.COMPLETED, **whole | arrays)


def test_metrics_of_a_configuration_are_those_it_adds() -> None:
    documented = {name for row in table("reference/metrics.md", "With an `AdvantageConfig`") for name in code(row[0])}
    groups = [RolloutGroup(1, [rollout_with(index, {"reward_parts": {"right": 1.0} if index else {}}) for index in range(4)])]
    numbers = {f"default-1-{index}": [0.5, 0.5] for index in range(2)} | {"default-1-2": [float("nan")] * 2}
    attached = Attached(reference=numbers, values=numbers, baselines={2: 0.0})
    by_length = AdvantageConfig(shape=(lambda rewards, lengths, truncated: [float("nan"), 1.0, 2.0, 3.0],), reward_clip=(0, 1))
    configs = [
        (AdvantageConfig("rloo", kl=KL(0.1), clip=(-1, 1)), attached),
        (AdvantageConfig("gae"), Attached(values=numbers)),
        (AdvantageConfig("gdpo"), Attached()),
        (by_length, Attached()),
    ]
    found = {name for config, beside in configs for name in make_experience(groups, advantage=config, attached=beside).metrics}
    with pytest.raises(ValueError, match="no_baseline"):
        make_experience(groups, advantage="remax", attached=attached)
    assert documented == (found | {"left_out/no_baseline"}) - set(make_experience(groups).metrics)


def test_metrics_of_a_correction_are_those_it_adds() -> None:
    documented = {name for row in table("reference/metrics.md", "With a correction") for name in code(row[0])}
    groups = [RolloutGroup(1, [rollout_with(index, {}) for index in range(3)])]
    attached = Attached(trainer={"default-1-0": [0.5, 0.5], "default-1-1": [float("nan")] * 2}, version=0)
    found = make_experience(groups, attached=attached, off_policy=OffPolicy("token", truncate=(0, 2), max_staleness=0)).metrics
    assert documented == set(found) - set(make_experience(groups).metrics)


def test_corrections_are_those_of_the_code() -> None:
    rows = table("explanation/off-policy.md", "What is done with them")
    assert {code(row[0])[0]: eval(code(row[1])[0]) for row in rows} == dict(CORRECTIONS)  # noqa: S307 - the pages of this repository
    for row in table("explanation/off-policy.md", "Matching another library"):
        assert isinstance(eval(code(row[2])[0]), OffPolicy)  # noqa: S307


@pytest.mark.parametrize("name", list(metadata.tables))
def test_tables_and_columns_are_those_of_the_schema(name: str) -> None:
    documented = [column for row in table("reference/database.md", f"`{name}`") for column in code(row[0])]
    assert documented == [column.name for column in metadata.tables[name].columns]


def test_the_table_of_engines_is_that_of_the_code() -> None:
    page = (ROOT / "docs/reference/engines.md").read_text()
    assert offers.with_table(page) == page, "run `make reference`"
    names = [row[0] for row in table("reference/engines.md", "What each engine can do")]
    assert [name.strip("`") for name in names] == [one.name for one in dataclasses.fields(Capabilities)]


def test_the_protocol_of_engines_is_that_of_the_code() -> None:
    documented = {name for row in table("reference/engines.md", "The protocol") for name in code(row[0])}
    asked = {name for name, member in vars(Engine).items() if inspect.iscoroutinefunction(member) and not name.startswith("_")}
    assert documented == asked | {"load"}
    documented = {name for row in table("reference/engines.md", "Structure and likely tokens") for name in code(row[0])}
    assert documented == set(STRUCTURES)


def test_no_table_is_documented_that_is_not_there() -> None:
    headings = re.findall(r"^### `(\w+)`$", (ROOT / "docs/reference/database.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(metadata.tables)


async def test_every_query_of_the_database_page_finds_something(run: tuple[Path, ProducedBatch]) -> None:
    queries = [block for block in blocks_of(ROOT / "docs/reference/database.md") if block.language == "sql"]
    assert len(queries) >= 5
    for block in queries:
        assert run_sql(block, run[0]), f"{block.place}: no row"


@pytest.mark.parametrize(
    "module", [buffer, agent_loop, producer, producer.experience, agent_loop.testing], ids=lambda module: module.__name__
)
def test_every_public_name_is_listed_with_a_sentence(module: Any) -> None:
    listed = {row[0].strip("`"): row[1] for row in table("reference/api.md", f"`{module.__name__}`")}
    assert sorted(listed) == sorted(module.__all__)
    assert all(sentence.endswith(".") for sentence in listed.values())


def test_names_listed_by_their_modules_exist() -> None:
    for heading in ("Engines", "Rewards that ask elsewhere", "Beside them"):
        for row in table("reference/api.md", heading):
            (module,), (name,) = code(row[0]), code(row[1])
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_engines_that_have_scores_are_those_of_the_code() -> None:
    documented = {code(row[0])[0]: row[1] == "yes" for row in table("how-to/choose-an-engine.md", "Scores")}
    listed = [(code(row[0])[0], code(row[1])[0]) for row in table("reference/api.md", "Engines")]
    engines = [getattr(importlib.import_module(module), name) for module, name in listed]
    assert documented == {engine.__name__: engine.score is not agent_loop.Engine.score for engine in engines}


@pytest.mark.parametrize("module", [buffer.errors, agent_loop.errors, producer.errors], ids=lambda module: module.__name__)
def test_every_error_is_listed_with_what_it_is(module: Any) -> None:
    documented = {code(row[0])[0]: set(code(row[1])) for row in table("reference/errors.md", f"`{module.__name__}`")}
    assert documented == {error.__name__: {base.__name__ for base in error.__bases__} for error in errors_of(module)}


def errors_of(module: Any) -> Iterator[type[Exception]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__:
            yield value


def help_of(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "producer.cli", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout


def test_commands_are_those_that_the_help_lists() -> None:
    headings = re.findall(r"^## `millrace (\w+)`$", (ROOT / "docs/reference/cli.md").read_text(), re.MULTILINE)
    assert headings == COMMANDS == re.findall(r"^  (\w+)", help_of().partition("Commands:")[2], re.MULTILINE)


COMMANDS = ["status", "metrics", "show", "query", "history", "audit", "export", "import", "prune", "migrate", "fork", "simulate", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command_are_those_that_its_help_lists(command: str) -> None:
    documented = [option for row in table("reference/cli.md", f"`millrace {command}`") for option in code(row[0])]
    said = re.split(r"^(?:Arguments|Options):", help_of(command), maxsplit=1, flags=re.MULTILINE)[1]
    listed = re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?|[A-Z_]+)(?= )", said, re.MULTILINE)
    assert [option for option in listed if option != "--help"] == documented


def test_no_page_is_left_as_a_merge_left_it() -> None:
    torn = [f"{page.name}: {line}" for page in PAGES for line in page.read_text().splitlines() if line.startswith(("<<<<<<<", ">>>>>>>"))]
    assert torn == []


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}, (
                f"{page}: {target}"
            )


@pytest.mark.parametrize("page", NAMES)
def test_files_and_tests_that_are_named_exist(page: str) -> None:
    """Paths in backticks; `tests/a.py::test_b` names a test, as `EngineSuite.test_b` does."""
    for name in code(FENCE.sub("", (ROOT / page).read_text())):
        if found := re.fullmatch(r"([\w./-]+/[\w-]+\.(?:py|md|txt|jsonl))(?:::(\w+))?", name):
            path = ROOT / found[1]
            assert path.exists(), f"{page} names {name}"
            assert found[2] is None or f"def {found[2]}(" in path.read_text(), f"{page} names {name}"
        if name.startswith("EngineSuite."):
            assert hasattr(agent_loop.testing.EngineSuite, name.partition(".")[2]), f"{page} names {name}"


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md" and path.parent.name != "decisions"]
    assert [str(path) for path in pages if f"({path.relative_to(ROOT / 'docs')})" not in index] == []
