"""How the transformers engine draws a batch of tokens: each row by its own parameters and its own seed."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from agent_loop.engines.adapters import Adapter
from agent_loop.sampling import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A, _MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class SamplingProcessor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Draws each row's token itself and leaves the library one choice: a row of -inf with a single 0.

    The log-probability of the drawn token, under the distribution it was drawn from, goes to `state.logprobs`, so
    that it travels with the request, also when the library puts the request back in its queue. The library's own
    sampling and log-probabilities must be off (`do_sample`, `return_logprobs`), and its batching synchronous:
    `prepare_tensor_args` and `__call__` must alternate.
    """

    supported_kwargs = {"params": SamplingParams, "seed": int, "adapter": Adapter}  # noqa: RUF012  # the base class declares it so
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing travels through the library's tensor of arguments."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Remember whose rows come next."""
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """`scores` [rows, vocabulary] in, the same shape out; rows past the remembered requests are padding."""
        count = len(self._states)
        if count == 0:
            return scores
        chosen, logprobs = draw(scores[:count], self._states)
        for state, logprob in zip(self._states, logprobs.tolist(), strict=True):
            state.logprobs.append(logprob)
        decided = torch.full_like(scores, -torch.inf)
        decided[:count].scatter_(1, chosen.unsqueeze(1), 0.0)
        return decided


def draw(scores: torch.Tensor, states: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawn tokens and their log-probabilities, [rows] each, from raw `scores` [rows, vocabulary] in float32.

    A draw is the argmax of the log-probabilities plus Gumbel noise that depends on the request's seed and the token's
    position only, so company in the batch changes nothing. Greedy rows have no noise, temperature 1 and no truncation.
    """
    params = [_greedy_is_plain(state.logit_processor_kwargs["params"]) for state in states]
    scores = penalise(scores, states, params)
    temperatures = scores.new_tensor([max(row.temperature, 1e-5) if row.temperature else 1.0 for row in params])
    logprobs = truncate(scores / temperatures.unsqueeze(1), params).log_softmax(-1)
    chosen = logprobs.argmax(-1)
    if drawn := [row for row, param in enumerate(params) if param.temperature > 0.0]:
        keys = [noise_key(states[row].logit_processor_kwargs["seed"], states[row].position_offset) for row in drawn]
        noise = gumbel_noise(keys, scores.shape[1], scores.device)
        chosen[drawn] = noise.add_(logprobs if len(drawn) == len(params) else logprobs[drawn]).argmax(-1)
    return chosen, logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _greedy_is_plain(params: SamplingParams) -> SamplingParams:
    return params if params.temperature > 0.0 else params.replace(top_p=1.0, top_k=0, min_p=0.0)


def penalise(scores: torch.Tensor, states: Sequence[Any], params: Sequence[SamplingParams]) -> torch.Tensor:
    """`scores` after each row's repetition penalty on the tokens of its prompt and response."""
    for row, (state, param) in enumerate(zip(states, params, strict=True)):
        if param.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*state.initial_tokens, *state.generated_tokens}), device=scores.device)
            old = scores[row, seen]
            scores[row, seen] = torch.where(old > 0, old / param.repetition_penalty, old * param.repetition_penalty)
    return scores


def truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """`logits` [rows, vocabulary] with what min_p, top_k and top_p cut off, in this order, at -inf."""
    if any(param.min_p for param in params):
        # log(0) is -inf: such a row loses nothing.
        least = logits.amax(-1, keepdim=True) + logits.new_tensor([[param.min_p] for param in params]).log()
        logits = logits.masked_fill(logits < least, -torch.inf)
    if not any(param.top_k or param.top_p < 1.0 for param in params):
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    vocabulary = logits.shape[1]
    last = torch.tensor([[min(param.top_k or vocabulary, vocabulary) - 1] for param in params], device=logits.device)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -torch.inf)
    probs = ordered.softmax(-1)
    # Above 1 where it is off: rounding of the sum must not cut the tail.
    nucleus = logits.new_tensor([[param.top_p if param.top_p < 1.0 else 2.0] for param in params])
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= nucleus, -torch.inf)
    return torch.empty_like(logits).scatter_(1, index, ordered)


def noise_key(seed: int, position: int) -> int:
    """64 bits for the token at `position` (counted from the prompt's first token) of a request with `seed`."""
    return _mix(_mix(seed & _MASK) + position * _GOLDEN)


def gumbel_noise(keys: Sequence[int], size: int, device: Any) -> torch.Tensor:
    """Standard Gumbel noise [len(keys), size] in float32; a row depends on its key only, on every device alike."""
    start = torch.tensor([[_signed(key)] for key in keys], dtype=torch.int64, device=device)
    bits = start + torch.arange(1, size + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    # In place: the vocabulary is large, and memory is what this costs.
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_signed(_MIX_A))
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_signed(_MIX_B))
    # 32 bits: the more, the better the tail, which decides how rare a token can be drawn. Below 1, or its log is -inf.
    uniform = _shifted(bits, 32).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_A) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_B) & _MASK
    return value ^ (value >> 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
