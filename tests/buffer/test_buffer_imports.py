"""Shows that the buffer imports nothing heavy, and that no package imports what could run code from a database."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "transformers", "trl", "httpx", "pydantic", "typer", "datasets", "torchdata", "pyarrow")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
SOURCES = sorted(path for package in ("buffer", "agent_loop", "producer") for path in (ROOT / package).rglob("*.py"))


def test_import_buffer_loads_nothing_heavy() -> None:
    program = f"import sys, buffer; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_stored_can_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not set(unsafe_in(node)), f"{path.name}:{getattr(node, 'lineno', 0)}"


def unsafe_in(node: ast.AST) -> list[str]:
    """What of the forbidden a node imports, calls or asks for."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names if name.name.split(".")[0] in UNSAFE_MODULES]
        case ast.ImportFrom(module=str(module)):
            return [module] if module.split(".")[0] in UNSAFE_MODULES else []
        case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
            return [name]
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            return ["allow_pickle"]
        case ast.Name(id="PickleType") | ast.Attribute(attr="PickleType"):
            return ["PickleType"]
        case _:
            return []


@pytest.mark.parametrize(
    "code", ["import pickle", "from marshal import loads", "eval('1')", "np.load(f, allow_pickle=True)", "sa.PickleType"]
)
def test_the_check_finds_what_it_looks_for(code: str) -> None:
    assert any(unsafe_in(node) for node in ast.walk(ast.parse(code)))
