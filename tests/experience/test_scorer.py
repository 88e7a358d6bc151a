"""Shows that a scorer gives what each model's own forward pass gives, packed or alone, in bounded memory; that it refuses models which it
cannot read; and that engines give the same numbers."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.sampling import SamplingParams
from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status
from producer.experience import EngineScorer, OffPolicy, make_experience

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from producer.experience.scorer import Scorer, rows_of  # noqa: E402  # both need torch
from tests.tiny_model import VOCAB_SIZE, make_tiny_model  # noqa: E402

LENGTHS = [9, 3, 40, 17, 2, 26]
STARTS = [4, 1, 7, 16, 1, 5]


def sequences(vocab_size: int = VOCAB_SIZE) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab_size, length) for length in LENGTHS]


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More only fight over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder).eval()


def alone(model: Any, ids: np.ndarray, start: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies of one sequence by the model's own forward pass, in float64 from its logits on."""
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)[None], use_cache=False).logits[0].double() / temperature
    logs = torch.log_softmax(logits, -1)[start - 1 : -1]
    chosen = logs.gather(-1, torch.as_tensor(ids[start:])[:, None])[:, 0]
    return chosen.numpy(), -(logs.exp() * logs).sum(-1).numpy()


def assert_as_alone(found: list[Any], model: Any, atol: float = 1e-5, temperature: float = 1.0, **options: Any) -> None:
    for one, ids, start in zip(found, sequences(**options), STARTS, strict=True):
        logprobs, entropy = alone(model, ids, start, temperature)
        np.testing.assert_allclose(one.logprobs, logprobs, atol=atol)
        assert one.logprobs.dtype == np.float32
        if one.entropy is not None:
            np.testing.assert_allclose(one.entropy, entropy, atol=atol)


@pytest.mark.parametrize(("attention", "budget"), [("sdpa", 1), ("sdpa", 45), ("eager", 1000)])
def test_packed_is_as_one_by_one(folder: Path, attention: str, budget: int) -> None:
    model = load(folder, attn_implementation=attention).eval()
    assert_as_alone(Scorer(model, token_budget=budget).score(sequences(), STARTS, entropy=True), model)


def test_rows_keep_the_budget_and_a_longer_sequence_is_alone() -> None:
    rows = rows_of([9, 3, 40, 17, 2, 26], 28)
    assert sorted(number for row in rows for number in row) == list(range(6))
    assert [2] in rows
    assert all(sum(LENGTHS[number] for number in row) <= 28 or row == [2] for row in rows)


def test_attention_that_takes_no_mask_is_told_where_sequences_begin(folder: Path) -> None:
    """Written as flash attention's varlen kernels are called, which need a GPU: each sequence by itself, from cu_seqlens alone."""

    def varlen(module: Any, query: Any, key: Any, value: Any, mask: Any, cu_seq_lens_q: Any = None, **given: Any) -> tuple[Any, None]:
        bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        spans = list(itertools.pairwise(bounds))
        assert cu_seq_lens_q is None or given["max_length_q"] == max(end - start for start, end in spans)
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        parts = [
            torch.nn.functional.scaled_dot_product_attention(*(one[:, :, start:end] for one in (query, key, value)), is_causal=True)
            for start, end in spans
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("varlen_of_this_test", varlen)
    model = load(folder, attn_implementation="varlen_of_this_test").eval()
    assert_as_alone(Scorer(model, token_budget=1000).score(sequences(), STARTS), load(folder).eval())


def test_temperature_divides_the_logits(model: Any) -> None:
    found = Scorer(model, temperature=0.6).score(sequences(), STARTS, entropy=True)
    assert_as_alone(found, model, temperature=0.6)


def test_bfloat16_is_as_the_model_itself_in_bfloat16(folder: Path, model: Any) -> None:
    half = load(folder, dtype=torch.bfloat16).eval()
    assert_as_alone(Scorer(half, token_budget=1000).score(sequences(), STARTS), half, atol=0.15)
    assert_as_alone(Scorer(model, token_budget=1000, autocast="bfloat16").score(sequences(), STARTS), half, atol=0.15)
    whole = Scorer(model).score(sequences(), STARTS)
    near = Scorer(half).score(sequences(), STARTS)
    assert np.mean([np.abs(one.logprobs - other.logprobs).mean() for one, other in zip(whole, near, strict=True)]) < 0.05


def test_logits_are_never_there_for_all_tokens(model: Any) -> None:
    """The largest tensor that any operation makes, and the largest that the head gives, stay within the bound."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor) and one.storage_offset() == 0:
                    self.numel = max(self.numel, one.numel())
            return out

    draw = np.random.default_rng(1)
    given = [draw.integers(0, VOCAB_SIZE, 200) for _ in range(2)]
    scorer = Scorer(model, logit_bytes=16 * 8 * VOCAB_SIZE)
    expected = Scorer(model).score(given, entropy=True)
    scorer.score(given)
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    with Largest() as largest:
        found = scorer.score(given, entropy=True)
    hook.remove()
    assert max(rows) == 16
    assert sum(rows) == 2 * 199
    # The embeddings, the mask of the row, and activations of the row: what a forward pass without a head has as well.
    assert largest.numel <= 400 * 400 < 2 * 199 * VOCAB_SIZE
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-5)


def test_only_tokens_that_are_asked_for_cost_the_head_anything(model: Any) -> None:
    rows: list[int] = []
    scorer = Scorer(model)
    scorer.score(sequences(), STARTS)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    scorer.score(sequences(), STARTS)
    hook.remove()
    assert sum(rows) == sum(LENGTHS) - sum(STARTS)


def test_a_reference_and_a_critic_are_read_beside_the_policy(folder: Path, other_folder: Path, model: Any) -> None:
    reference = load(other_folder).eval()
    critic = transformers.AutoModelForTokenClassification.from_pretrained(other_folder, num_labels=1).eval()
    found = Scorer(model, reference=reference, critic=critic, token_budget=45).score(sequences(), STARTS)
    assert_as_alone(found, model)
    for one, ids, start in zip(found, sequences(), STARTS, strict=True):
        np.testing.assert_allclose(one.reference, alone(reference, ids, start)[0], atol=1e-5)
        with torch.no_grad():
            values = critic(torch.as_tensor(ids)[None]).logits[0, :, 0].numpy()
        np.testing.assert_allclose(one.values, values[start - 1 : -1], atol=1e-5)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    shared = Scorer(model, value_head=head).score(sequences(), STARTS)
    with torch.no_grad():
        states = model.model(torch.as_tensor(sequences()[0])[None]).last_hidden_state
        np.testing.assert_allclose(shared[0].values, head(states)[0, 3:-1, 0].numpy(), atol=1e-5)
    sequence_critic = transformers.AutoModelForSequenceClassification.from_pretrained(other_folder, num_labels=1)
    assert Scorer(critic=sequence_critic).score(sequences(), STARTS)[0].values.shape == (5,)


def test_adapters_are_switched_off_for_the_reference_and_wrappers_are_seen_through(folder: Path, model: Any) -> None:
    class Adapted(type(load(folder))):  # type: ignore[misc]
        """What peft promises: a context manager that takes the adapter out of the way."""

        @contextmanager
        def disable_adapter(self) -> Iterator[None]:
            with torch.no_grad():
                self.model.norm.weight.mul_(0.5)
                yield
                self.model.norm.weight.mul_(2)

    adapted = Adapted.from_pretrained(folder)
    with torch.no_grad():
        adapted.model.norm.weight.mul_(2)
    found = Scorer(adapted, reference="adapter_off").score(sequences(), STARTS)
    assert_as_alone(found, adapted.eval())
    for one, ids, start in zip(found, sequences(), STARTS, strict=True):
        np.testing.assert_allclose(one.reference, alone(model, ids, start)[0], atol=1e-5)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        np.testing.assert_array_equal(Scorer(wrapped).score(sequences()[:1])[0].logprobs, Scorer(model).score(sequences()[:1])[0].logprobs)
    with pytest.raises(ValueError, match="'adapter_off' with a model that has a disable_adapter"):
        Scorer(model, reference="adapter_off")


def test_a_model_in_training_is_read_without_dropout_and_stays_in_training(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.h[1].eval()
    found = Scorer(model, token_budget=60).score(sequences(64), STARTS)
    assert model.training
    assert model.transformer.h[0].training
    assert not model.transformer.h[1].training
    assert_as_alone(found, model.eval(), vocab_size=64)
    assert all(parameter.grad is None for parameter in model.parameters())


def small(name: str, **options: Any) -> Any:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**common, intermediate_size=64, head_dim=16, initializer_range=0.2, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 6}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Qwen3", {}),
    ],
)
def test_what_a_model_does_to_its_logits_is_done_to_them_here(name: str, options: dict[str, Any]) -> None:
    model = small(name, **options)
    assert_as_alone(Scorer(model, token_budget=60).score(sequences(64), STARTS), model, vocab_size=64)


def test_models_that_cannot_be_read_packed_are_refused_and_read_one_by_one() -> None:
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2)
    )
    with pytest.raises(ValueError, match=r"BloomForCausalLM lets packed sequences see each other.* pass packed=False"):
        Scorer(bloom).score(sequences(64), STARTS)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(ValueError, match=r"MambaForCausalLM lets packed sequences see each other"):
        Scorer(mamba).score(sequences(64), STARTS)
    for model in (bloom.eval(), mamba):
        assert_as_alone(Scorer(model, packed=False).score(sequences(64), STARTS), model, vocab_size=64)

    class Doubled(type(small("Qwen3"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    with pytest.raises(ValueError, match="Doubled changes its logits in a way that is not known here"):
        Scorer(Doubled(small("Qwen3").config)).score(sequences(64), STARTS)


def test_a_model_that_diverged_is_told_from_one_that_cannot_be_packed(folder: Path) -> None:
    """Before its first use it is refused; after that its rollouts are left out, each with the reason."""
    model = load(folder)
    scorer = Scorer(model)
    scorer.score(sequences(), STARTS)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite; its weights have diverged"):
        Scorer(model).score(sequences(), STARTS)
    with pytest.raises(ValueError, match=r"'trainer_not_finite': 2"):
        make_experience(groups(), attached=scorer.attached(groups()), off_policy="tis")


def test_what_makes_no_sense_is_refused(model: Any) -> None:
    scorer = Scorer(model)
    for given, starts, why in (
        ([[1, 600]], 1, "outside the vocabulary of 512"),
        ([[1, -1]], 1, "outside the vocabulary of 512"),
        ([[1.0, 2.0]], 1, "not token ids"),
        ([[1]], 1, "has 1 tokens and start=1"),
        ([[1, 2]], 0, "has 2 tokens and start=0"),
        ([[1, 2]], [1.5], "starts=1.5 must be a whole number"),
        ([[1, 2]], [1, 1], "2 starts for 1 sequences"),
    ):
        with pytest.raises(ValueError, match=why):
            scorer.score(given, starts)
    assert scorer.score([]) == []
    assert scorer.score([[1, 2, 3]], np.int64(2))[0].logprobs.shape == (1,)
    for options, why in (
        ({}, "needs a model"),
        ({"model": "some/model"}, "'some/model' is not a loaded model"),
        ({"model": model, "temperature": 0.0}, "temperature=0.0"),
        ({"model": model, "token_budget": 0}, "token_budget=0"),
        ({"model": model.model}, "not a transformers model with a head"),
        ({"critic": model}, "none of"),
        ({"reference": model, "value_head": torch.nn.Linear(4, 1)}, "give the critic or the model"),
        ({"critic": transformers.AutoModelForTokenClassification.from_config(model.config)}, "gives 2 numbers a token"),
    ):
        with pytest.raises(ValueError, match=why):
            Scorer(**options)


def groups(with_media: bool = False) -> list[RolloutGroup]:
    """Two members with an environment's tokens between their own, one that failed, and one without a reward."""
    rollouts = []
    for index in range(4):
        state = RolloutState(3, index, status=Status.COMPLETED, prompt_ids=np.array([5, 6, 7 + index]))
        state.append([10 + index, 11], logprobs=[-1.0, -1.0])
        state.append([20], trainable=False)
        state.append([12], logprobs=[-1.0])
        state.reward = state.score = None if index == 3 else float(index)
        state.error = "it failed" if index == 2 else None
        state.media = ["image.png"] if with_media else None
        rollouts.append(state)
    return [RolloutGroup(3, rollouts)]


def test_a_batch_is_scored_and_trained_on(model: Any, other_folder: Path) -> None:
    attached = Scorer(model, reference=load(other_folder)).attached(groups(), version=4)
    assert set(attached.trainer) == set(attached.reference) == {"default-3-0", "default-3-1"}
    assert (attached.version, attached.temperature, attached.values) == (4, 1.0, {})
    np.testing.assert_allclose(attached.trainer["default-3-1"], alone(model, np.array([5, 6, 8, 11, 11, 20, 12]), 3)[0], atol=1e-5)
    made = make_experience(groups(), attached=attached, off_policy="tis")
    assert made.importance is not None
    ratios = np.exp(np.asarray(attached.trainer["default-3-0"])[[0, 1, 3]] + 1.0)
    np.testing.assert_allclose(made.importance[0, [3, 4, 6]], np.minimum(ratios, 2), rtol=1e-5)
    assert made.reference_logprobs is not None
    with pytest.raises(ValueError, match="has media, and a scorer shows a model tokens only"):
        Scorer(model).attached(groups(with_media=True))


async def test_engines_score_a_batch_at_one_version() -> None:
    async with SimulatedEngine(seed=1) as engine, SimulatedEngine(seed=2) as reference:
        await engine.update_weights({"seed": 3}, version=3)
        attached = await EngineScorer(engine, reference=reference, max_in_flight=1).attached(groups())
        expected = engine.reference_logprobs([5, 6, 7], [10, 11, 20, 12], 3)
        policy = engine.with_adapter("policy")
        await policy.update_weights({"seed": 4}, version=8)
        adapted = await EngineScorer(policy, reference=engine).attached(groups())
    np.testing.assert_allclose(attached.trainer["default-3-0"], expected, rtol=1e-6)
    assert (attached.version, attached.temperature, set(attached.reference)) == (3, 1.0, set(attached.trainer))
    np.testing.assert_array_equal(adapted.reference["default-3-0"], attached.trainer["default-3-0"])
    assert not np.allclose(adapted.trainer["default-3-0"], attached.trainer["default-3-0"])
    assert adapted.version == 8
    made = make_experience(groups(), attached=attached, off_policy=OffPolicy(sampling=SamplingParams()))
    assert made.metrics["off_policy/ratio_mean"] > 0


async def test_weights_that_change_while_a_batch_is_scored_are_an_error() -> None:
    class Changing(SimulatedEngine):
        async def score(self, token_ids: Any, *, start: int = 1) -> Any:
            scored = await super().score(token_ids, start=start)
            await self.update_weights({"seed": 9}, version=self.version + 1)
            return scored

    async with Changing(seed=1) as engine:
        with pytest.raises(RuntimeError, match=r"the weights went from version 0 to 2 while a batch was scored"):
            await EngineScorer(engine).attached(groups())


async def test_engines_that_have_no_scores_fail_or_are_cancelled_are_told_apart() -> None:
    async with SimulatedEngine(script=lambda prompt_ids: [0]) as engine:
        with pytest.raises(ValueError, match="SimulatedEngine gives no log-probabilities of given tokens"):
            await EngineScorer(engine).attached(groups())
    with pytest.raises(ValueError, match="needs an engine or a reference"):
        EngineScorer()
    with pytest.raises(ValueError, match="max_in_flight=0"):
        EngineScorer(engine, max_in_flight=0)

    class Waiting(SimulatedEngine):
        waiting = 0

        async def score(self, token_ids: Any, *, start: int = 1) -> Any:
            self.waiting += 1
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.waiting -= 1

    begun = asyncio.Event()
    async with Waiting(seed=1) as waiting, asyncio.TaskGroup() as tasks:
        scoring = tasks.create_task(EngineScorer(waiting).attached(groups()))
        await begun.wait()
        scoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scoring
        assert waiting.waiting == 0
