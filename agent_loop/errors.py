"""What can go wrong between an agent loop, its engine and its reward."""


class AgentLoopError(Exception):
    """Root of every error that the agent loops, engines and rewards raise for a reason of their own."""


class EngineError(AgentLoopError):
    """The engine failed on a request or on a control call."""


class EngineDeadError(EngineError):
    """The engine is gone: nothing sent to it will be answered again. `__cause__` holds why, where it is known."""


class EngineClosedError(EngineError, RuntimeError):
    """The engine was used before it was opened or after it was closed."""


class RequestRefusedError(EngineError, ValueError):
    """The request can never succeed (bad ids, too long, unknown adapter); trying again is of no use."""


class WeightUpdateError(EngineError):
    """New weights could not be put in force; the old weights and version still are."""


class AdapterError(WeightUpdateError):
    """An adapter could not be loaded; it is not there, and what was there still is."""


class ToolError(AgentLoopError):
    """A tool gave no answer. One may raise it with what the model is to be told; other errors are told with the names of their types."""


class RewardError(AgentLoopError):
    """A reward function raised, took too long, or gave something that is not a finite number."""


class RewardTimeoutError(RewardError, TimeoutError):
    """A reward took longer than it may."""


class RewardClosedError(RewardError, RuntimeError):
    """A reward that asks a server, a model or processes was used before it was opened or after it was closed."""


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that made a task group fail, out of its wrapping."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
