"""How a run stands, as metrics for Prometheus: `families` by name, `exposition` as its text (the extra `prometheus`)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from producer.cli.records import Record
from producer.cli.safe import escaped
from producer.metrics import STALENESS_SHOWN

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Value = float | int | None


class Family(NamedTuple):
    """One metric with all its samples; those without a value are left out."""

    name: str
    help: str
    kind: Literal["gauge", "counter"]
    labels: Sequence[str]
    samples: Sequence[tuple[Sequence[str], Value]]


def exposition(status: Record) -> str:
    """Prometheus' text format. Characters of labels that are not printable are escaped, as everywhere in the command.

    Raises `ImportError` where the library is missing.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise ImportError("Prometheus' text needs prometheus_client: pip install 'millrace[prometheus]', or use --json") from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(status))
    return generate_latest(registry).decode()


class _Collector:
    """What the library asks for the metrics."""

    def __init__(self, status: Record) -> None:
        self._status = status

    def collect(self) -> "Iterable[Metric]":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family in families(self._status):
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric: Any = kind(f"millrace_{family.name}", family.help, labels=list(family.labels))
            for labels, value in family.samples:
                if value is not None:
                    metric.add_metric([escaped(str(label)) for label in labels], float(value))
            yield metric


def records_of(status: Record) -> list[Record]:
    """The same samples for `--json`."""
    return [
        {"name": f"millrace_{family.name}", "labels": dict(zip(family.labels, labels, strict=True)), "value": value}
        for family in families(status)
        for labels, value in family.samples
        if value is not None
    ]


def families(status: Record) -> Iterator[Family]:
    """All metrics of a run."""
    yield from _of_run(status)
    yield from _of_tasks(status["tasks"])
    yield from _of_producers(status["producers"])


def _of_run(status: Record) -> Iterator[Family]:
    def gauge(name: str, text: str, value: Value) -> Family:
        return Family(name, text, "gauge", (), [((), value)])

    yield gauge("committed_step", "Last committed step.", status["committed_step"])
    yield gauge("policy_version", "Newest version of the policy that the database knows of.", status["version"])
    yield gauge("rewinds", "How often the run was rewound.", status["timeline"])
    yield gauge("abandoned_groups", "Running groups of no producer.", status["abandoned"])
    yield gauge("last_change_timestamp_seconds", "When a group changed its status last.", status["last_change"])
    yield gauge("database_bytes", "Size of the database.", status["database_bytes"])
    yield gauge("payload_bytes", "Tokens of committed groups, which prune may give up.", status["payload_bytes"])


def _of_tasks(tasks: Mapping[str, Record]) -> Iterator[Family]:
    def each(name: str, text: str, *path: str, kind: Literal["gauge", "counter"] = "gauge", per: float = 1) -> Family:
        return Family(name, text, kind, ["task"], [((task,), _scaled(_at(of, path), per)) for task, of in tasks.items()])

    def split(name: str, text: str, label: str, values: Mapping[str, Mapping[Any, Value]]) -> Family:
        return Family(name, text, "gauge", ["task", label], [((task, key), n) for task, of in values.items() for key, n in of.items()])

    accounts = {task: of["account"] for task, of in tasks.items()}
    yield each("prompts_drawn", "Prompts ever drawn.", "drawn", kind="counter")
    yield split("groups", "Groups by status.", "status", {task: of["counts"] for task, of in tasks.items()})
    yield each("groups_pruned", "Groups whose rows were given up.", "pruned")
    yield each("last_step", "Last step at which a batch was taken.", "last_step")
    yield each("groups_completed_per_second", "Groups completed lately.", "completed_per_minute", per=60)
    yield each("groups_consumed_per_second", "Groups handed out lately.", "consumed_per_minute", per=60)
    yield split(
        "waiting_groups", "Groups that wait, by staleness.", "staleness", {t: _histogram(of["by_staleness"]) for t, of in tasks.items()}
    )
    yield each("tokens_generated", "Tokens ever sampled.", "account", "generated", kind="counter")
    yield each("tokens_trained", "Tokens handed out to the trainer.", "account", "trained")
    yield each("tokens_waiting", "Tokens of groups that may still be handed out.", "account", "waiting")
    yield split(
        "tokens_wasted", "Tokens that will not be trained on, by reason.", "reason", {t: of["wasted"] for t, of in accounts.items()}
    )
    yield each("length_bias_ratio", "Mean length of responses trained on over that of all finished, minus 1.", "account", "length_bias")
    yield each("coverage_bias_ratio", "Prompts drawn some steps ago that are not trained on.", "account", "coverage_bias")
    yield each("overdue_prompts", "Prompts that wait, though drawn some steps ago.", "account", "overdue")


def _of_producers(producers: Sequence[Record]) -> Iterator[Family]:
    labels = ["host", "pid", "owner"]
    for name, text, key in (
        ("producer_running_groups", "Groups that a producer runs.", "running"),
        ("producer_lease_seconds", "Seconds until a producer's groups are given to others, unless it renews.", "expires_in"),
    ):
        yield Family(name, text, "gauge", labels, [([str(one[label]) for label in labels], one[key]) for one in producers])


def _at(record: Record, path: Sequence[str]) -> Value:
    value: Any = record
    for key in path:
        value = value[key]
    return value  # type: ignore[no-any-return]  # a number, or None


def _scaled(value: Value, per: float) -> Value:
    return None if value is None else value / per if per != 1 else value


def _histogram(by_staleness: Mapping[int, int]) -> dict[str, int]:
    """Counts of staleness 0, 1, ... and of all large ones together."""
    found = Counter[int]()
    for staleness, n in by_staleness.items():
        found[min(max(0, int(staleness)), STALENESS_SHOWN)] += n
    return {str(value): found[value] for value in range(STALENESS_SHOWN)} | {f"{STALENESS_SHOWN}_up": found[STALENESS_SHOWN]}
