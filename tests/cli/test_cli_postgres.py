"""The command `millrace` over a run in PostgreSQL: the same answers, and writing beside a trainer that goes on."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from buffer import ReplayBuffer, Status
from tests import postgres
from tests.buffer.groups import a_group, draw, put_all, url
from tests.cli.command import in_process, millrace, refused, said


@pytest_asyncio.fixture
async def run(server: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The address of a run that a process of ours still has open: a committed step, a consumed one, and two groups running."""
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n, version=n) for n in range(1, 6)])
        for step in (1, 2):
            await buffer.take("math", 2, step=step, version=step)
        await buffer.commit(1)
        await draw(buffer, 0, 1, 2)
        await buffer.claim("math", 2, statuses=[Status.PENDING])
        yield url(tmp_path)
    postgres.drop_schemas(server.address)


def test_it_answers_as_over_a_file(run: str, tmp_path: Path) -> None:
    found = json.loads(said("status", run, "--json"))
    counts = {status: n for status, n in found["tasks"]["math"]["counts"].items() if n}
    assert counts == {"archived": 2, "consumed": 2, "completed": 1, "running": 2, "pending": 1}
    assert (found["producers"][0]["running"], found["payload_groups"], found["free_bytes"]) == (2, 2, None)
    assert 0 < found["database_bytes"] < 10_000_000
    assert said("status", run).startswith("postgres: 8 prompts drawn, last step 2\n")
    assert [group["group_id"] for group in json.loads(said("query", run, "--step", 2, "--json"))] == [3, 4]
    assert [change["target"] for change in json.loads(said("history", run, 1, "--json"))] == ["completed", "consumed", "archived"]
    assert "every prompt is accounted for" in said("audit", run, "--payloads")
    assert "rollout 1: archived" in said("show", run, 1)


def test_it_writes_beside_a_trainer_that_goes_on(run: str, tmp_path: Path) -> None:
    path, other = tmp_path / "run.jsonl", url(tmp_path, "other")
    assert json.loads(said("export", run, path, "--status", "archived", "--json"))["groups"] == 2
    assert json.loads(said("import", other, path, "--json"))["groups"] == 2
    assert json.loads(said("prune", run, "--keep-last", 1, "--yes", "--json"))["payloads"] == 1
    assert json.loads(said("fork", run, tmp_path / "fork.db", "--step", 1, "--json"))["groups"] == 8
    assert said("migrate", run).startswith("nothing to do: postgres has schema version ")
    for database in (run, other, tmp_path / "fork.db"):
        assert "every prompt is accounted for" in said("audit", database)
    assert json.loads(said("status", run, "--json"))["tasks"]["math"]["counts"]["running"] == 2


def test_what_cannot_be_reached_is_one_line_without_the_password(server: postgres.Server) -> None:
    refused(millrace("status", "postgresql://me:secret@127.0.0.1:1/run"), "Connection refused")
    refused(in_process("audit", server.address.replace("/postgres?", "/absent?")), '"absent" does not exist')
    refused(in_process("status", server.address), "is no Millrace buffer")
    for command in (("prune", "--rows", "--yes"), ("migrate",)):
        refused(in_process(command[0], server.address, *command[1:]), "is no Millrace buffer")
    assert postgres.execute(server.address, "SELECT 1 FROM pg_tables WHERE tablename = 'groups' AND schemaname = 'public'") == []
