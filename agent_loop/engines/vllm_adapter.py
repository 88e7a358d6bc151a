"""Between our words and vLLM's: starting it quietly, and translating parameters, versions and what is known of the model."""

import asyncio
import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from agent_loop.engines.base import TopLogprobs
from agent_loop.engines.checkpoint import Checkpoint, read_checkpoint
from agent_loop.engines.vllm_load import LoadMonitor, without_iteration_stats
from agent_loop.engines.vllm_transfer import NEEDS_CUDA
from agent_loop.engines.vllm_worker import OWNER, WorkerExtension
from agent_loop.errors import EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams

SETTINGS = {
    # vLLM writes its log to standard output and sends usage reports; a library does neither unasked.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # The engine starts from a thread of a program that has others: forking it could copy a lock that is held.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Environment of the engine process while it starts, where the user has not set these."""


def start_engine(args: dict[str, Any], monitor: LoadMonitor, start: "Start") -> None:
    """Import vLLM, start its engine process and put the `AsyncLLM` into `start`; blocks, and so runs in a thread.

    It is not returned: the frames of this thread are kept alive by tracebacks that vLLM holds, and would keep it as well.
    """
    with _environment():
        # vLLM heeds its level only from `AsyncLLM` on, and its own imports touch deprecated names of torch.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        check_args(args)

        # Who asks vLLM for its own metrics gets them; else this takes their place.
        quietly = args["disable_log_stats"]
        loggers = [monitor.stat_logger()] if quietly else None
        start.begins()
        start.llms.append(AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=loggers))
        if quietly:
            without_iteration_stats(start.llms[-1])


async def to_its_end(work: Callable[..., Any], *args: Any, on_cancel: Callable[[], None] | None = None) -> Any:
    """Run `work` in a thread, and return when it is done; a cancellation that comes meanwhile is raised then.

    `on_cancel` may hasten it: it is called at a cancellation, and from then on twice a second.
    """
    done = asyncio.get_running_loop().run_in_executor(None, work, *args)
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait({done}, timeout=0.5 if cancelled is not None and on_cancel is not None else None)
        except asyncio.CancelledError as error:
            cancelled = error
        if cancelled is not None and on_cancel is not None:
            on_cancel()
    if cancelled is not None:
        done.exception()  # looked at, or asyncio reports it as forgotten
        raise cancelled
    return done.result()


class Start:
    """A start of vLLM: what came of it, and how it is called off."""

    def __init__(self) -> None:
        self.llms: list[Any] = []
        self._before: set[Any] | None = None

    def begins(self) -> None:
        """The engine processes that there are now are those of others."""
        self._before = _engine_cores()

    def call_off(self) -> None:
        """Kill the engine process that loads, so that vLLM's start fails now and not when a large model is loaded."""
        if self._before is not None and not self.llms:
            for process in _engine_cores() - self._before:
                process.kill()


def _engine_cores() -> set[Any]:
    return {process for process in multiprocessing.active_children() if process.name.startswith("EngineCore")}


_environment_lock = threading.Lock()


def check_args(args: dict[str, Any]) -> None:
    """Raise `ValueError` for what vLLM would only stumble over in its engine process, or later."""
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    extension = args["worker_extension_cls"]
    if not issubclass(resolve_obj_by_qualname(extension), WorkerExtension):
        raise ValueError(
            f"worker_extension_cls={extension!r} is no subclass of agent_loop.engines.vllm_worker.WorkerExtension; make it one"
        )
    transfer = args.get("weight_transfer_config")
    backend = transfer["backend"] if isinstance(transfer, dict) and "backend" in transfer else getattr(transfer, "backend", "nccl")
    if transfer is not None and backend in NEEDS_CUDA and current_platform.is_cpu():
        raise ValueError(f"weight transfer by {backend!r} needs GPUs; on a CPU give update_weights a folder or a state dict")


@contextmanager
def _environment() -> Iterator[None]:
    """`SETTINGS` in force where the user has set nothing else; one start at a time."""
    with _environment_lock:
        settings = SETTINGS | {OWNER: str(os.getpid())}
        added = [name for name in settings if name not in os.environ]
        os.environ.update({name: settings[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """The logger of this name silent for a while."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def fail_waiting(core: Any, death: BaseException) -> None:
    """Fail the control calls that a dead engine process will never answer: vLLM leaves them waiting for ever."""
    for answer in core.utility_results.values():
        if not answer.done():
            answer.set_exception(death)


def eos_token_ids(llm: Any) -> frozenset[int]:
    """Of the model's generation config, or else its config, and of the tokenizer."""
    named = llm.input_processor.generation_config_fields.get("eos_token_id")
    if named is None:
        named = getattr(llm.model_config.hf_text_config, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else named
    own = llm.tokenizer.eos_token_id if llm.tokenizer is not None else None
    return frozenset(named) | (frozenset() if own is None else {own})


def engine_processes(llm: Any) -> list[Any]:
    """The engine processes that vLLM started from this one."""
    return list(getattr(llm.engine_core.resources.engine_manager, "processes", []))


def stop_engine(llm: Any) -> None:
    """Shut vLLM down and wait until its processes are gone: past five seconds it kills them and waits no more."""
    import psutil  # vLLM needs it, so it is there

    processes = engine_processes(llm)
    workers: list[Any] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            workers += psutil.Process(process.pid).children(recursive=True)
    llm.shutdown()
    for process in processes:
        process.join()
    for worker in psutil.wait_procs(workers, timeout=10)[1]:
        worker.kill()
    psutil.wait_procs(workers)


def obituary(llm: Any) -> str:
    """What is known of the engine process's end."""
    processes = engine_processes(llm)
    codes = ", ".join(str(process.exitcode) for process in processes)
    return f"vLLM's engine process is gone (exit code {codes or 'unknown'}); nothing sent to it is answered, make a new engine"


def vllm_params(params: SamplingParams, eos_token_ids: Collection[int], *, piece_tokens: int | None) -> Any:
    """`params` in vLLM's words; `piece_tokens` None: the whole response at its end, else in pieces of so many tokens."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        stop=list(params.stop),
        # EOS by name: vLLM knows it from the tokenizer, which may be absent.
        stop_token_ids=sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}),
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        logprobs=params.top_logprobs,
        flat_logprobs=True,
        structured_outputs=None if params.structured_outputs is None else _structure(params.structured_outputs),
        detokenize=bool(params.stop),
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY if piece_tokens is None else RequestOutputKind.DELTA,
        stream_interval=piece_tokens,
        skip_clone=True,
    )


def _structure(asked: Mapping[str, Any]) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    try:
        return StructuredOutputsParams(**asked)
    except (TypeError, ValueError) as error:
        raise RequestRefusedError(f"structured_outputs={asked!r:.120} is refused by vLLM: {error}") from error


def look_params(*, likely_tokens: int = 0) -> Any:
    """A request that samples one token, and tells what it made of its prompt, or which next tokens are likely."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        max_tokens=1,
        temperature=0.0,  # vLLM reports log-probabilities at temperature 1 then
        logprobs=likely_tokens,
        prompt_logprobs=None if likely_tokens else 0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def prompt_logprobs(given: Any, ids: Sequence[int]) -> list[float]:
    """The log-probabilities of `ids` but the first, from vLLM's flat list of them."""
    if list(given.token_ids) != list(ids[1:]):
        raise EngineError(f"vLLM scored {len(given.token_ids)} tokens that are not the {len(ids) - 1} asked for")
    return [float(logprob) for logprob in given.logprobs]


def chosen_logprobs(flat: Any, top_logprobs: int) -> list[float]:
    """Those of the sampled tokens, from vLLM's flat list: at each position the sampled token, then the likeliest."""
    return list(flat.logprobs) if not top_logprobs else flat.logprobs[:: top_logprobs + 1]


def likeliest(flats: Sequence[Any], top_logprobs: int) -> TopLogprobs:
    """The likeliest tokens at each position, from the flat lists of a response's pieces."""
    wide = top_logprobs + 1
    ids = np.concatenate([np.array(flat.token_ids, np.int32).reshape(-1, wide) for flat in flats])[:, 1:]
    logprobs = np.concatenate([np.array(flat.logprobs, np.float32).reshape(-1, wide) for flat in flats])[:, 1:]
    return TopLogprobs(ids, logprobs)


def token_versions(spans: Sequence[Any] | None, count: int) -> list[int]:
    """One version a token from vLLM's spans `[start, end)`."""
    versions = [int(span.version) for span in spans or () for _ in range(span.start, span.end)]
    if len(versions) != count:
        raise EngineError(f"vLLM gave {count} tokens without saying by which weights: {spans}")
    return versions


def checkpoint_of(model_config: Any) -> Checkpoint | None:
    """The checkpoint that the engine was started with; None where it has no safetensors files to compare with."""
    folder = Path(model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(folder), revision=model_config.revision, local_files_only=True))
    try:
        return read_checkpoint(folder)
    except ValueError:
        return None


def tied(model_config: Any) -> bool:
    """Whether the model's output matrix is its input embedding."""
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
