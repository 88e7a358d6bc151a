"""What each engine offers, as a table: `python -m agent_loop.engines.offers docs/reference/engines.md` writes it into that page."""

import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path

from agent_loop.engines.base import ALL_TOKENS, Capabilities, Engine

ENGINES = {
    "VLLMEngine": "agent_loop.engines.vllm",
    "VLLMServerEngine": "agent_loop.engines.vllm_server",
    "TransformersEngine": "agent_loop.engines.transformers",
    "SimulatedEngine": "agent_loop.engines.simulated",
}
"""The engines of the table, and their modules."""

BEGIN, END = "<!-- made by `make reference`: begin -->", "<!-- end -->"


def engines() -> list[type[Engine]]:
    """Their classes; their modules are imported now."""
    return [getattr(importlib.import_module(module), name) for name, module in ENGINES.items()]


def table() -> str:
    """A row for each capability, a column for each engine, from `Engine.offers` and `Engine.only_with`."""
    classes, told = engines(), _descriptions()
    rows = [["Capability", "What it is", *(f"`{one.__name__}`" for one in classes)], ["---"] * (2 + len(classes))]
    rows += [[f"`{one.name}`", told[one.name], *(_cell(engine, one.name) for engine in classes)] for one in fields(Capabilities)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(page: str) -> str:
    """The text of a page with the table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    begin, end = page.find(BEGIN), page.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"the page lacks the marks {BEGIN!r} and {END!r}; put them where the table belongs")
    return f"{page[:begin]}{BEGIN}\n{table()}\n{page[end:]}"


def _cell(engine: type[Engine], name: str) -> str:
    offered = getattr(engine.offers, name)
    if not offered:
        return "no"
    value = "yes" if offered is True else "all" if offered == ALL_TOKENS else str(offered)
    return f"{value}, {engine.only_with[name]}" if name in engine.only_with else value


def _descriptions() -> dict[str, str]:
    """Of each capability, from the docstring of `Capabilities`."""
    lines = (Capabilities.__doc__ or "").split("Attributes:")[1]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", lines, re.M | re.S)}


def main(path: str) -> None:
    """Write the table into the page at `path`."""
    page = Path(path)
    page.write_text(with_table(page.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
