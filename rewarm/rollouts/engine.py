"""In-process generation: completions of a transformers decoder with the log-probs they were sampled under."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rewarm.checks import at_least, in_range

CHECK_STEPS = 16  # steps between two looks at how many rows still run: each look makes an accelerator wait
COMPACT_FRAC = 0.25  # finished rows leave the cache once they are more than this share of it
# Positions by which the cache grows at once; a CPU reads more slowly across larger gaps.
CPU_ROOM, ACCELERATOR_ROOM = 8, 128


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    Args:
        tokens: Token ids without the prompt, ending with the end-of-sequence token if it was sampled.
        logprobs: Log-probability of each token under the distribution it was drawn from, in nats, <= 0.
        finished: True if it ended with an end-of-sequence token, False if it was cut at the length limit.

    Example:
        >>> Completion(tokens=[5, 2], logprobs=[-0.5, -0.1], finished=True).finished
        True
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform number.

    p = softmax(logits / temperature), cut to the top_k most probable tokens, then to the smallest set whose
    mass reaches top_p, renormalised;  token = the first i with p_0 + ... + p_i > uniform

    Args:
        logits: Next-token logits. Shape (B, V), finite.
        uniform: Independent draws in [0, 1). Shape (B,), float64.
        temperature: >= 0; 0 takes the most probable token, whose log-prob is then 0.
        top_k: Number of tokens kept, in [0, V]; 0 keeps all. Tokens that tie with the last one are kept too.
        top_p: Probability mass kept, in (0, 1].

    Returns:
        Tokens (B,) and their log-probs (B,), float32, in nats; not finite where the logits are not finite.

    Example:
        >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
        >>> sample(logits, torch.tensor([0.1]), top_k=2)
        (tensor([1]), tensor([-0.4700]))

    Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p).
    Differs: The draw is an input, so that a row's tokens do not depend on the batch it is sampled in.
    """
    logits = logits.float()
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - best  # 0, but NaN for broken logits
    logits = logits / temperature
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, index = logits.sort(-1, descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    logprobs = logits.log_softmax(-1)
    # In float32 the rounding of the sum could land a draw on a token of probability 0. MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logprobs.exp().cumsum(-1, dtype=wide)
    threshold = uniform.to(wide) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)
    tokens = tokens.clamp_max(logits.shape[-1] - 1)  # beyond the end only where the logits are NaN
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


class TransformersEngine:
    """Samples several completions per prompt from a transformers decoder in the same process.

    Each prompt is prefilled once and its key-value cache forked to all its samples; rows that ended are
    dropped from the cache. The weights are those of the model at the call, so completions are never stale.
    The random numbers are its own, one per token, set by seed, place of the prompt, sample and step; neither
    batching nor PyTorch's global generators play a part. The model must accept a `DynamicCache`.

    Args:
        max_new_tokens: Most tokens per completion, end-of-sequence included, >= 1.
        eos_token_id: Token id, or ids, each of which ends a completion.
        pad_token_id: Token id that fills prompts on the left; never attended to.
        temperature: Logits are divided by it, >= 0; 0 is greedy. Training must divide them likewise.
        top_p: Probability mass that is kept, in (0, 1].
        top_k: Number of most probable tokens that are kept, 0 for all.
        max_tokens_in_flight: Most cache positions (sequences times the longest length) held at once; prompts
            are then taken in batches of similar length. None takes all prompts in one batch.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> engine = TransformersEngine(max_new_tokens=3, eos_token_id=7, pad_token_id=0)
        >>> rollouts = engine.generate(LlamaForCausalLM(config), [[1, 2], [3]], num_samples=4, seed=0)
        >>> [len(completions) for completions in rollouts]
        [4, 4]

    Source: none (ours).   Differs: greedy tokens equal those of `transformers.generate`, sampled ones do not.
    """

    def __init__(
        self,
        max_new_tokens: int,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens_in_flight: int | None = None,
    ) -> None:
        eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        at_least(1, max_new_tokens=max_new_tokens)
        if not eos or min(eos) < 0:
            raise ValueError(
                f"eos_token_id is {eos_token_id}; it must be a token id or a non-empty list of token ids"
            )
        at_least(0, pad_token_id=pad_token_id, top_k=top_k)
        in_range("[0, inf)", temperature=temperature)
        in_range("(0, 1]", top_p=top_p)
        if max_tokens_in_flight is not None:
            at_least(1, max_tokens_in_flight=max_tokens_in_flight)
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = eos
        self.pad_token_id = pad_token_id
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.max_tokens_in_flight = max_tokens_in_flight

    # Not inference_mode: a buffer that a forward replaces (dynamic RoPE) would then be unusable in training.
    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        seed: int | Sequence[int],
    ) -> list[list[Completion]]:
        """Sample completions of every prompt from the model's present weights.

        Args:
            model: A decoder with a language-modelling head. In eval mode during the call, then as it was.
            prompts: Q prompts of token ids, each of 1 to (the model's context less max_new_tokens) tokens.
            num_samples: Completions per prompt G, >= 1.
            seed: Seed of the random draws; the same weights, prompts and seed give the same completions. One
                per prompt makes each prompt's completions its own, whatever the others are.

        Returns:
            Q lists of G completions, in the order of the prompts.

        Raises:
            ValueError: If a prompt or num_samples is out of range.
            RuntimeError: If the model's logits are NaN or infinite.
        """
        self._check(model, prompts, num_samples)
        shape = (len(prompts), num_samples, self.max_new_tokens)
        # Drawn on the CPU, so that every kind of device sees the same numbers.
        uniform = torch.empty(shape, dtype=torch.float64)
        generator = torch.Generator()
        if isinstance(seed, int):
            uniform.uniform_(generator=generator.manual_seed(seed))
        else:
            for own, rows in zip(seed, uniform, strict=True):
                rows.uniform_(generator=generator.manual_seed(own))
        rollouts: dict[int, list[Completion]] = {}
        with _eval_mode(model):
            for batch in self._batches([len(prompt) for prompt in prompts], num_samples):
                rows = self._decode(model, [prompts[i] for i in batch], uniform[batch])
                rollouts |= {i: rows[n * num_samples : (n + 1) * num_samples] for n, i in enumerate(batch)}
        return [rollouts[i] for i in range(len(prompts))]

    def _check(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_samples: int) -> None:
        at_least(1, num_samples=num_samples)
        config = model.config.get_text_config(decoder=True)
        in_range(f"[0, {config.vocab_size}]", top_k=self.top_k)  # tokens of the vocabulary
        context = getattr(config, "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            length = len(prompt) + self.max_new_tokens
            if not prompt:
                raise ValueError(f"prompts[{i}] is empty; it must have at least one token")
            if context is not None and length > context:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; at most {context - self.max_new_tokens} fit "
                    f"(the model's context of {context} less max_new_tokens={self.max_new_tokens})"
                )
            if self.max_tokens_in_flight is not None and num_samples * length > self.max_tokens_in_flight:
                raise ValueError(
                    f"max_tokens_in_flight is {self.max_tokens_in_flight}; it must be at least"
                    f" {num_samples * length} to hold the {num_samples} samples of prompts[{i}]"
                    f" ({len(prompt)} tokens)"
                )

    def _batches(self, lengths: list[int], num_samples: int) -> list[list[int]]:
        """Indices of the prompts in batches of similar length, longest first: memory fails early or never."""
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batches:
                width = lengths[batches[-1][0]] + self.max_new_tokens
                in_flight = (len(batches[-1]) + 1) * num_samples * width
                if self.max_tokens_in_flight is None or in_flight <= self.max_tokens_in_flight:
                    batches[-1].append(i)
                    continue
            batches.append([i])
        return batches

    def _decode(
        self, model: PreTrainedModel, prompts: list[Sequence[int]], uniform: Tensor
    ) -> list[Completion]:
        """Completions of one batch, samples of a prompt next to each other. uniform: (Q, G, T)."""
        num_samples, device = uniform.shape[1], model.device
        uniform = uniform.flatten(0, 1).to(device, torch.float32 if device.type == "mps" else None)
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = max(len(prompt) for prompt in prompts)
        padded = [[self.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        eos = torch.tensor(self.eos_token_ids, device=device)

        column = torch.arange(width + self.max_new_tokens, device=device) - (width - length)[:, None]
        # Without a padding mask transformers takes its faster attention paths and reads nothing back.
        mask = (column >= 0).long() if any(len(prompt) < width for prompt in prompts) else None
        cache = rollout_cache(model)
        logits = _next_logits(
            model, cache, torch.tensor(padded, device=device), mask, column[:, :width].clamp_min(0)
        )
        cache.batch_repeat_interleave(num_samples)
        logits, column = (x.repeat_interleave(num_samples, 0) for x in (logits, column))
        mask = mask if mask is None else mask.repeat_interleave(num_samples, 0)

        rows = torch.arange(len(uniform), device=device)
        done = torch.zeros_like(rows, dtype=torch.bool)
        tokens = torch.full(uniform.shape, self.pad_token_id, device=device)
        logprobs = torch.zeros(uniform.shape, device=device)
        check_steps = 1 if device.type == "cpu" else CHECK_STEPS
        for step in range(self.max_new_tokens):
            token, logprob = sample(
                logits, uniform[rows, step], temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
            )
            tokens[rows, step], logprobs[rows, step] = token, logprob
            done |= torch.isin(token, eos)
            if step + 1 == self.max_new_tokens:
                break
            if (step + 1) % check_steps == 0:
                running = int((~done).sum())
                if running == 0:
                    break
                if len(rows) - running > COMPACT_FRAC * len(rows):
                    keep = (~done).nonzero()[:, 0]
                    cache.batch_select_indices(keep)
                    rows, done, token, column = rows[keep], done[keep], token[keep], column[keep]
                    mask = mask if mask is None else mask[keep]
            end = width + step
            logits = _next_logits(model, cache, token[:, None], mask, column[:, end : end + 1])
        return _cut(tokens, logprobs, eos)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them: a token is written, where `DynamicLayer` copies them all."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        device_type = key_states.device.type
        if torch.is_autocast_enabled(device_type):
            # Attention would narrow all of them at every token.
            dtype = torch.get_autocast_dtype(device_type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        seen, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._room or end > self._room[0].shape[-2]:
            length = end + (CPU_ROOM if device_type == "cpu" else ACCELERATOR_ROOM)
            self._room = [_with_room(states, length) for states in (self.keys, self.values)]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., seen:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = []


def _with_room(states: Tensor, length: int) -> Tensor:
    room = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room


def rollout_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty key-value cache that grows by several positions at once."""
    cache = DynamicCache(config=model.config)
    # Layers with a window of their own stay short.
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _next_logits(
    model: PreTrainedModel, cache: DynamicCache, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor
) -> Tensor:
    seen = cache.get_seq_length() + input_ids.shape[1]
    return model(
        input_ids=input_ids,
        attention_mask=None if mask is None else mask[:, :seen],
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _cut(tokens: Tensor, logprobs: Tensor, eos: Tensor) -> list[Completion]:
    """End each row after its first end-of-sequence token; it may have run on until the next check."""
    if not logprobs.isfinite().all():
        raise RuntimeError("the model returned logits that are NaN or infinite, so no token can be sampled")
    ends = torch.isin(tokens, eos)
    finished = ends.any(-1)
    length = torch.where(finished, ends.int().argmax(-1) + 1, tokens.shape[-1])
    columns = zip(tokens.tolist(), logprobs.tolist(), length.tolist(), finished.tolist(), strict=True)
    return [Completion(token[:end], logprob[:end], ended) for token, logprob, end, ended in columns]


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    # Module by module: a model in training may hold frozen parts in eval mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
