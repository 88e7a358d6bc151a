"""`Tool`: a function that a model may call, with the schema of its arguments and a deadline."""

import asyncio
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_loop.deadline import TooSlow, called, in_time
from agent_loop.errors import ToolError
from agent_loop.sampling import number
from agent_loop.tool_schema import check_schema, mismatch, schema_of


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        function: sync or async; is called with the arguments by keyword, and returns text, or what JSON takes. One that is not async
            runs on a thread of its own, which is not waited for beyond the deadline.
        name: by which the model calls it; the function's.
        description: what the model is told of it; the function's docstring.
        parameters: the JSON schema of its arguments; made of the function's annotations. `agent_loop.tool_schema.mismatch` says which
            keywords are checked; whatever else a schema says is told to the model only.
        timeout: seconds for one call.

    Raises:
        ValueError: there is no name, no schema can be made of the annotations, or `timeout` is not above 0.
    """

    function: Callable[..., Any]
    name: str = ""
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"{self.function!r:.60} is no tool; give a function, or Tool(function, ...)")
        name = self.name or getattr(self.function, "__name__", "")
        if not name or name == "<lambda>":
            raise ValueError(f"the tool {self.function!r:.60} has no name; give Tool(function, name=...)")
        if number("timeout", self.timeout) <= 0:
            raise ValueError(f"tool {name}: timeout={self.timeout} s leaves no time; it must be above 0")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "description", self.description or inspect.getdoc(self.function) or "")
        try:
            if not self.parameters:
                object.__setattr__(self, "parameters", schema_of(self.function))
            check_schema(self.parameters)
        except (ValueError, TypeError, NameError) as error:
            raise ValueError(f"tool {name}: {error}; or give Tool(function, parameters=a JSON schema)") from error

    @property
    def schema(self) -> dict[str, Any]:
        """What chat templates are told of it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """What the model is told of a call with these arguments.

        Raises:
            ToolError: the arguments are not as the schema says, the function raised, took too long, or returned what is no JSON.
        """
        if why := mismatch(self.parameters, dict(arguments)):
            raise ToolError(f"{self.name}: {why}")
        try:
            value = await in_time(called(functools.partial(self.function, **arguments), thread="millrace-tool"), self.timeout)
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except TooSlow:
            raise ToolError(f"{self.name} took longer than {self.timeout:g} s") from None
        except ToolError:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ToolError(f"{self.name}: it cancelled itself") from error
        except (Exception, SystemExit) as error:
            raise ToolError(f"{self.name}: {type(error).__name__}: {error}") from error


def tools_by_name(tools: Iterable[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by the names by which models call them.

    Raises:
        TypeError: they are no list of functions and `Tool`s.
        ValueError: two have one name, or one cannot be a tool.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise TypeError(f"tools={tools!r:.60} are no list of tools; give one, such as [add]")
    made = [tool if isinstance(tool, Tool) else Tool(tool) for tool in tools]
    names = [tool.name for tool in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tools have the name {twice[0]!r}; give one of them Tool(function, name=...)")
    return dict(zip(names, made, strict=True))
