"""`SingleTurnAgentLoop`: one prompt, one response."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.agent_loop import AgentLoop
from agent_loop.chat import Tokenizer, encode_chat
from agent_loop.engines.base import Engine
from agent_loop.errors import RequestRefusedError
from agent_loop.rewards import Reward
from agent_loop.sampling import SamplingParams
from buffer.rollout import RolloutState


class SingleTurnAgentLoop(AgentLoop):
    """Encodes the prompt, samples one response, decodes it, asks the reward.

    The images of a row go to the engine with the tokens, and the row's `tools` to the chat template, as by a `Sampler`.

    Args:
        engine: which samples.
        tokenizer: encodes `prompt` or `messages` where a row has no `prompt_ids`, and decodes the response's `text`;
            None where rows have `prompt_ids` and no text is wanted.
        reward: gives the score of a finished rollout.
        sampling: parameters for all prompts; a row's `sampling` overrides them.
        options: of `AgentLoop`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        reward: Reward | None = None,
        *,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> None:
        super().__init__(engine, reward, sampling=sampling, **options)
        if tokenizer is not None and not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer={tokenizer!r:.80} has no encode and decode; the reward is the third argument, or reward=")
        self.tokenizer = tokenizer

    async def generate(self, state: RolloutState) -> RolloutState:
        """One response, continued where it was left."""
        if state.prompt_ids is None:
            state.prompt_ids = self._encode(state)
        reason = await self.extend(state)
        if self.tokenizer is not None:
            # From all ids at once: a character may be split over two continuations.
            state.text = self.tokenizer.decode(state.response_ids.tolist(), skip_special_tokens=True)
        state.finish_reason = reason
        return state

    def _encode(self, state: RolloutState) -> NDArray[np.int32]:
        if self.tokenizer is None:
            raise RequestRefusedError(f"rollout {state.rollout_id} has no prompt_ids and this loop no tokenizer; give one of the two")
        if state.messages is not None:
            ids: Any = encode_chat(state.messages, self.tokenizer, tools=state.row.get("tools"))
        else:
            ids = self.tokenizer.encode(state.prompt or "")
        return np.asarray(ids, dtype=np.int32)
