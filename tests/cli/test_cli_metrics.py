"""Shows that `millrace metrics` is text that Prometheus' own parser reads back as what the overview says, whatever names tasks have."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from buffer import Status
from producer.cli import records
from producer.cli.prometheus import exposition, families
from producer.cli.safe import escaped
from tests.cli.command import HOSTILE_TASK, asked, in_process, refused, said

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, "no sample is told twice"
            found[key] = sample.value
    return found


def test_every_sample_is_that_of_the_overview(db: Path) -> None:
    found = parsed(said("metrics", db))
    overview = asked(db, lambda buffer: buffer.overview())
    for name, task in overview.tasks.items():
        own = ("task", escaped(name))
        for status in Status:
            assert found["millrace_groups", (("status", status), own)] == task.counts[status]
        assert found["millrace_prompts_drawn_total", (own,)] == task.drawn
        assert found["millrace_tokens_generated_total", (own,)] == task.account.generated
        parts = [n for (metric, labels), n in found.items() if metric.startswith("millrace_tokens_") and own in labels]
        assert sum(parts) == 2 * task.account.generated, "trained, waiting and wasted add up to generated"
        waiting = [n for (metric, labels), n in found.items() if metric == "millrace_waiting_groups" and own in labels]
        assert sum(waiting) == sum(task.by_staleness.values())
    assert found["millrace_committed_step", ()] == overview.committed_step == 1
    assert found["millrace_length_bias_ratio", (("task", "demo"),)] == overview.tasks["demo"].account.length_bias
    assert ("millrace_length_bias_ratio", (("task", escaped(HOSTILE_TASK)),)) not in found, "there is none while nothing is trained on"


def test_labels_are_escaped_and_read_back(db: Path) -> None:
    text = said("metrics", db)
    assert all(character.isprintable() or character == "\n" for character in text)
    tasks = {dict(labels)["task"] for _, labels in parsed(text) if "task" in dict(labels)}
    assert tasks == {"demo", escaped(HOSTILE_TASK)}


@pytest.mark.parametrize("name", ['quo"ted', "back\\slash", "line\nbreak", "{brace}", "größe", "\ud800", "a,b=c", "# HELP x"])
def test_any_name_of_a_task_comes_back(name: str, db: Path) -> None:
    status: dict[str, Any] = asked(db, records.status_of)
    status["tasks"] = {name: status["tasks"]["demo"]}
    found = parsed(exposition(status))
    assert {dict(labels)["task"] for _, labels in found if "task" in dict(labels)} == {escaped(name)}


def test_json_has_the_same_samples(db: Path) -> None:
    text, listed = parsed(said("metrics", db)), json.loads(said("metrics", db, "--json"))
    same = {
        (one["name"], tuple(sorted((key, escaped(value)) for key, value in one["labels"].items()))): float(one["value"]) for one in listed
    }
    moving = ("millrace_producer", "millrace_groups_completed_per_second", "millrace_groups_consumed_per_second")
    for (name, labels), value in same.items():
        exposed = (name, labels) if (name, labels) in text else (f"{name}_total", labels)
        if not name.startswith(moving):
            assert math.isclose(text[exposed], value)
    assert len(same) == len(listed) == len(text)


def test_names_are_those_of_the_reference(db: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs/reference/metrics.md").read_text()
    table = page[page.index("## For Prometheus") :]
    shown = set(re.findall(r"`(millrace_\w+)(?:{[a-z,]+})?`", table))
    told = asked(db, records.status_of)
    names = {f"millrace_{family.name}{'_total' if family.kind == 'counter' else ''}" for family in families(told)}
    assert shown == names


def test_without_the_library_it_says_how_it_is_installed(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    refused(in_process("metrics", db), "pip install 'millrace[prometheus]'")
    assert json.loads(said("metrics", db, "--json"))
