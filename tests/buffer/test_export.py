"""Shows that groups come back from files as they went in, that others read these files, and that a bad file is refused whole."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from buffer import Position, RolloutGroup, RolloutState
from buffer import export as export_module
from buffer.errors import FileFormatError
from buffer.export import read_groups, write_groups, write_jsonl, write_parquet
from buffer.export_rows import COLUMNS
from tests.buffer.groups import a_group, ids, plain
from tests.buffer.test_codec import UNHURRIED, groups

ROOT = Path(__file__).parents[2]
SUFFIXES = [".parquet", ".jsonl", ".jsonl.gz"]
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def some(n: int = 3) -> list[RolloutGroup]:
    made = [a_group(number, position=Position(0, number), version=number) for number in range(1, n + 1)]
    for group in made:
        for rollout in group.rollouts:
            rollout.row = {"prompt": f"p{group.group_id}", "answer": [1, {"two": None}]}
    return made


@every_suffix
@UNHURRIED
@given(group=groups())
def test_a_group_comes_back_equal_in_every_field(suffix: str, group: RolloutGroup, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / f"run{suffix}"
    assert write_groups(path, [group, group]) == 2
    assert [plain(back) for back in read_groups(path)] == [plain(group)] * 2


@every_suffix
def test_many_slices_of_unequal_groups_come_back_in_order(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_SLICE_BYTES", 20_000)
    written = [a_group(number, size=1 + number % 5, tokens=7 * number % 40, version=number) for number in range(200)]
    for group in written[::3]:
        group.rollouts[0].prompt_ids = np.arange(group.group_id % 4, dtype=np.int32)
    write_groups(tmp_path / f"run{suffix}", written)
    assert [plain(group) for group in read_groups(tmp_path / f"run{suffix}")] == [plain(group) for group in written]


@every_suffix
def test_bits_of_log_probabilities_that_are_no_numbers_stay(suffix: str, tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0x7FC00002, 0xFF800000, 0x80000000, 0, 0x3F800001], np.uint32)
    state = RolloutState(1, 0, response_ids=range(6), logprobs=bits.view(np.float32), loss_mask=[0, 0, 0, 1, 1, 1], versions=[0] * 6)
    write_groups(tmp_path / f"run{suffix}", [RolloutGroup(1, [state])])
    (back,) = read_groups(tmp_path / f"run{suffix}")
    assert back.rollouts[0].logprobs.view(np.uint32).tolist() == bits.tolist()


@every_suffix
def test_text_that_is_no_utf8_stays(suffix: str, tmp_path: Path) -> None:
    group = a_group(1)
    group.rollouts[0].text = group.rollouts[1].error = "half a pair: \ud800"
    group.rollouts[1].text = '"\\ud800"'  # what the first looks like when it is escaped
    write_groups(tmp_path / f"run{suffix}", [group])
    (back,) = read_groups(tmp_path / f"run{suffix}")
    assert plain(back) == plain(group)


@every_suffix
def test_no_groups_are_a_file_too(suffix: str, tmp_path: Path) -> None:
    assert write_groups(tmp_path / f"run{suffix}", []) == 0
    assert list(read_groups(tmp_path / f"run{suffix}")) == []


def test_every_field_has_a_column() -> None:
    elsewhere = {"rollouts", "index", "timeline", "dropped"}
    named = {f.name for cls in (RolloutGroup, RolloutState) for f in fields(cls)} - elsewhere
    assert named <= set(COLUMNS)


@every_suffix
def test_a_score_that_no_file_can_hold_is_refused(suffix: str, tmp_path: Path) -> None:
    group = a_group(1)
    group.rollouts[1].reward = float("nan")
    with pytest.raises(ValueError, match="rollout math-1-1: reward is nan"):
        write_groups(tmp_path / f"run{suffix}", [group])
    assert list(tmp_path.iterdir()) == []


# --- other programs


LOADERS: dict[str, Callable[[Path], Any]] = {".parquet": pd.read_parquet, ".jsonl": lambda path: pd.read_json(path, lines=True)}
LOADERS[".jsonl.gz"] = LOADERS[".jsonl"]


@every_suffix
def test_pandas_reads_it(suffix: str, tmp_path: Path) -> None:
    path, written = tmp_path / f"run{suffix}", some()
    write_groups(path, written)
    frame = LOADERS[suffix](path)
    assert frame["group_id"].tolist() == [1, 1, 2, 2, 3, 3]
    assert frame["reward"].mean() == 1.0
    assert [list(one) for one in frame["response_ids"]] == [[0, 1, 2]] * 6
    assert json.loads(frame["row"][5])["prompt"] == "p3"


@every_suffix
def test_hugging_face_datasets_reads_it(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path, written = tmp_path / f"run{suffix}", some()
    write_groups(path, written)
    kind = "parquet" if suffix == ".parquet" else "json"
    loaded = datasets.load_dataset(kind, data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert set(COLUMNS) <= set(loaded.column_names)
    assert loaded["group_id"][:] == [1, 1, 2, 2, 3, 3]
    assert loaded["response_ids"][0] == [0, 1, 2]
    assert json.loads(loaded["row"][5])["prompt"] == "p3"
    assert kind == "json" or str(loaded.features["logprobs"].feature.dtype) == "float32"


def test_what_datasets_writes_again_is_read(tmp_path: Path) -> None:
    written = some()
    write_parquet(tmp_path / "run.parquet", written)
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "run.parquet"), cache_dir=str(tmp_path / "cache"), split="train")
    loaded.to_parquet(str(tmp_path / "again.parquet"))
    assert [plain(group) for group in read_groups(tmp_path / "again.parquet")] == [plain(group) for group in written]


def test_columns_of_parquet_have_the_types_of_the_arrays(tmp_path: Path) -> None:
    write_parquet(tmp_path / "run.parquet", some())
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "run.parquet")}
    assert types["response_ids"] == types["versions"] == types["prompt_ids"] == "list<element: int32>"
    assert (types["logprobs"], types["loss_mask"]) == ("list<element: float>", "list<element: uint8>")


# --- names and places


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path}/runs for run.jsonl; make it first"):
        write_groups(tmp_path / "runs" / "run.jsonl", some())


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    for write in (write_groups, write_jsonl, write_parquet):
        with pytest.raises(ValueError, match="parquet"):
            write(tmp_path / "run.csv", some())
    with pytest.raises(ValueError, match=r"run\.csv"):
        next(read_groups(tmp_path / "run.csv"))
    with pytest.raises(ValueError, match=r"neither \.jsonl nor \.jsonl\.gz"):
        write_jsonl(tmp_path / "run.parquet", some())
    assert list(tmp_path.iterdir()) == []


@every_suffix
def test_a_file_that_is_there_is_replaced_only_on_request(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    write_groups(path, some(1))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_groups(path, some(2))
    assert ids(list(read_groups(path))) == [1]
    write_groups(path, some(2), overwrite=True)
    assert ids(list(read_groups(path))) == [1, 2]
    assert os.listdir(tmp_path) == [path.name]


@every_suffix
def test_a_file_that_comes_there_meanwhile_is_not_replaced(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"

    def groups_and_a_file() -> Iterator[RolloutGroup]:
        yield from some(1)
        path.write_text("somebody's")

    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_groups(path, groups_and_a_file())
    assert path.read_text() == "somebody's"
    assert os.listdir(tmp_path) == [path.name]


@every_suffix
def test_what_ends_the_writing_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    def groups_that_end() -> Iterator[RolloutGroup]:
        yield from some(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_groups(tmp_path / f"run{suffix}", groups_that_end())
    assert os.listdir(tmp_path) == []


KILLED = """
import itertools, os, signal, sys
from buffer import export
from tests.buffer.groups import a_group
export._SLICE_BYTES = 1

def groups():
    for number in itertools.count(1):
        if number == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        yield a_group(number)

export.write_groups(sys.argv[1], groups(), overwrite=True)
"""


@every_suffix
def test_a_kill_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    write_groups(path, some(1))
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert ids(list(read_groups(path))) == [1]
    (left,) = (name for name in os.listdir(tmp_path) if name != path.name)
    assert left.endswith(".partial")


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_memory_does_not_grow_with_the_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_SLICE_BYTES", 2**18)
    path = tmp_path / f"run{suffix}"
    n, tokens = 300, 2000

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    written = peak(lambda: write_groups(path, (a_group(number, tokens=tokens) for number in range(n))))
    read = peak(lambda: sum(1 for _ in read_groups(path)))
    whole = n * 2 * tokens * 13
    assert max(written, read) < whole / 2


# --- bad files


@every_suffix
def test_a_file_cut_off_anywhere_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    write_groups(path, some(2))
    whole = path.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=f"run{suffix}, row "):
            list(read_groups(path))


def test_a_file_of_lines_cut_off_behind_a_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_groups(path, some(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(FileFormatError, match="row 3: the file ends before its last row"):
        list(read_groups(path))
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(FileFormatError, match=r"row 5: .*behind the end"):
        list(read_groups(path))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz"])
def test_a_flipped_byte_changes_nothing_silently(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    write_groups(path, some(2))
    whole, written, refused = path.read_bytes(), [plain(group) for group in some(2)], 0
    places = range(5, len(whole), max(1, len(whole) // 100))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert [plain(group) for group in read_groups(path)] == written
        except FileFormatError:
            refused += 1
    assert refused > len(places) / 2


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a missing column": ({"versions": ...}, "column 'versions' is missing"),
    "an unknown column": ({"extra": 1}, "column 'extra' is none of an export's"),
    "a newer format": ({"format": 2}, "format 2, this Millrace knows 1"),
    "another group": ({"group_id": 9}, "member 1 of group 9 stands where member 1 of group 1"),
    "a place twice": ({"member": 0}, "member 0 of group 1 stands where member 1"),
    "another task": ({"task_name": "other"}, "group 1 is another in this row"),
    "a status that is none": ({"status": "eaten"}, "unknown status 'eaten'"),
    "a status that does not fit": ({"status": "failed"}, "said to be completed, its members make it failed"),
    "a short array": ({"versions": [0]}, "lengths differ"),
    "a token too large": ({"response_ids": [1, 2, 2**31]}, "int32"),
    "a fraction of a token": ({"response_ids": [1, 2, 0.5]}, "int32"),
    "text for tokens": ({"response_ids": ["1", "2", "3"]}, "must be a list of numbers"),
    "a negative token": ({"response_ids": [1, 2, -3]}, "0 or more"),
    "null in a list": ({"loss_mask": [1, None, 1]}, "must be a list of numbers"),
    "no log-probability where it trains": ({"logprobs": [None, 0.0, 0.0], "logprobs_bits": "[[0,2143289344]]"}, "must be finite"),
    "bits of nothing": ({"logprobs_bits": "[[0,1]]"}, "logprobs_bits does not say"),
    "nested JSON": ({"row": {"prompt": "p"}}, "row is .*must be of type json"),
    "JSON of another shape": ({"row": "[]"}, "row is .*must be JSON of a dict"),
    "no JSON": ({"metrics": "{"}, "row 2"),
    "a list of text": ({"text": ["a"]}, "text is .*must be of type text"),
    "true for a number": ({"attempts": True}, "attempts is True"),
    "a number too large": ({"consumed_step": 2**63}, "64 bits"),
    "a reward too large": ({"reward": 10**400}, "too large to convert to float"),
    "half a position": ({"epoch": None}, "group 1 is another in this row"),
    "escaped what is no text": ({"escaped": '["row"]'}, "must be a JSON list of text columns"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_named(damage: str, tmp_path: Path) -> None:
    changes, message = DAMAGES[damage]
    path = tmp_path / "run.jsonl"
    write_groups(path, some(1))
    first, second = map(json.loads, path.read_text().splitlines())
    changed = {name: value for name, value in (second | changes).items() if value is not ...}
    path.write_text(json.dumps(first) + "\n" + json.dumps(changed) + "\n")
    with pytest.raises(FileFormatError, match=message) as error:
        list(read_groups(path))
    assert "run.jsonl, row 2: " in str(error.value)


@pytest.mark.parametrize("line", ["[]", "1", "nothing", '{"a": 1}', '{"a": NaN}', "", "[" * 100_000, "\xff"])
def test_lines_of_something_else_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n" + b"\n")
    with pytest.raises(FileFormatError, match=r"run.jsonl, row [12]: "):
        list(read_groups(path))


@every_suffix
def test_a_file_of_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    path.write_bytes(gzip.compress(b"hello\n") if suffix == ".jsonl" else b"hello\n")
    with pytest.raises(FileFormatError, match="row 1: "):
        list(read_groups(path))
    with pytest.raises(FileNotFoundError):
        list(read_groups(tmp_path / f"none{suffix}"))


def change(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_parquet_of_other_columns_or_types_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    write_parquet(path, some(1))
    table = pq.read_table(path)
    uuid = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0123456789abcdef"] * 2, pa.binary(16)))
    bad = {
        "column 'row' is missing": table.drop_columns("row"),
        "column 'more' is none": table.append_column("more", pa.array([1, 2])),
        "column 'text' is of type extension<arrow.uuid>": change(table, "text", uuid),
        "column 'versions' is of type list<element: int64>": change(table, "versions", table["versions"].cast(pa.list_(pa.int64()))),
        "a list holds nulls": change(table, "loss_mask", pa.array([[1, None, 1], [1, 1, 1]], pa.list_(pa.uint8()))),
        "reward is inf, and must be finite": change(table, "reward", pa.array([1.0, float("inf")])),
        "attempts is missing": change(table, "attempts", pa.array([None, 0], pa.int64())),
    }
    for message, other in bad.items():
        pq.write_table(other, path)
        with pytest.raises(FileFormatError, match=message):
            list(read_groups(path))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "run.parquet", some(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"millrace\[parquet\]"):
        list(read_groups(tmp_path / "run.parquet"))
    with pytest.raises(ImportError, match=r"millrace\[parquet\]"):
        write_parquet(tmp_path / "other.parquet", some(1))
    assert write_jsonl(tmp_path / "run.jsonl", some(1)) == 1
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "run.parquet"]
