"""Scores under a model: losses, pass rates, angles and distances of its hidden states."""

from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rewarm.checks import at_least
from rewarm.datamodules.loader import collate_rows
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.policy import Policy
from rewarm.lightning_modules.sharding import decoder_layers
from rewarm.rollouts.pass_rate import wilson_interval
from rewarm.rollouts.rewards import load_reward
from rewarm.rollouts.sampling import read_prompts, sample_from, sample_groups
from rewarm.scoring.difficulty import angle_concentration, perplexity
from rewarm.scoring.difficulty import perplexity_ratio as ratio_of
from rewarm.scoring.prototypes import fit_prototypes
from rewarm.scoring.score_job import Job, Overlong
from rewarm.scoring.text_scores import Result, Scores
from rewarm.text.encoding import Tokens, load_tokenizer
from rewarm.text.formats import template_arguments

_MARK = "7f3a9-the-question"
_CHUNK = 4096  # embeddings that k-means looks at together


def _sums(job: Job, policy: Policy, sequences: list[Tokens]) -> Tensor:
    """Log-probability of what is learnt of each sequence, and of how many tokens. (N, 2)."""
    batch = collate_rows([[one] for one in sequences], job.encoder.tokenizer.pad_token_id, restart=False)
    moved = {
        name: batch[name].to(job.device) for name in ("input_ids", "position_ids", "targets", "sequence_ids")
    }
    logprobs = policy(
        moved["input_ids"],
        moved["position_ids"],
        moved["targets"],
        documents=batch["documents"],
        num_targets=batch["num_targets"],
    )
    counted = (moved["targets"] != IGNORE_INDEX).float()
    return torch.stack(
        [sequence_sums(values, moved["sequence_ids"], len(sequences)) for values in (logprobs, counted)], 1
    )


def _trained(job: Job, max_length: int | None, overlong: Overlong) -> list[Tokens | None]:
    """The sequences that have something to learn."""
    fitting = job.fitting(job.data.sequences(job.encoder), max_length, overlong)
    return [s if s is not None and bool(s.learn[1:].any()) else None for s in fitting]


def _lengths(sequences: list[Tokens | None]) -> list[int | None]:
    return [None if sequence is None else sequence.positions for sequence in sequences]


def _listed(values: Tensor) -> Scores:
    return [None if value != value else value for value in values.tolist()]


def _completion_sums(job: Job, max_length: int | None, overlong: Overlong) -> tuple[Tensor, Tensor]:
    sequences: Any = _trained(job, max_length, overlong)
    found = job.over(
        _lengths(sequences), 2, lambda batch: _sums(job, job.policy, [sequences[place] for place in batch])
    )
    sums, counts = torch.from_numpy(numpy.array(found)).double().unbind(1)
    return sums, counts


def loss(job: Job, *, max_length: int | None = None, overlong: Overlong = "error") -> Result:
    """Mean negative log-likelihood of what training would learn, in nats per token.

    Args:
        job: Pass over the examples with a model.
        max_length: Most positions per example, >= 1; without it, the model's context.
        overlong: What becomes of longer examples.
    """
    sums, counts = _completion_sums(job, max_length, overlong)
    return Result({"": _listed(-sums / counts)})


def perplexity_score(job: Job, *, max_length: int | None = None, overlong: Overlong = "error") -> Result:
    """Perplexity of what training would learn.

    Args:
        job: Pass over the examples with a model.
        max_length: Most positions per example, >= 1; without it, the model's context.
        overlong: What becomes of longer examples.
    """
    sums, counts = _completion_sums(job, max_length, overlong)
    known = ~sums.isnan()
    sums[known] = perplexity(sums[known], counts[known])
    return Result({"": _listed(sums)})


def perplexity_ratio(
    job: Job, *, other: str | None = None, max_length: int | None = None, overlong: Overlong = "error"
) -> Result:
    """Perplexity of a completion with its prompt, relative to that without; or relative to another model's.

    Without its prompt, a completion follows the tokenizer's BOS token (EOS where there is none), and what has
    no prompt has no score.

    Args:
        job: Pass over the examples with a model.
        other: Compare with this model, and not with leaving out the prompt.
        max_length: Most positions per example, >= 1; without it, the model's context.
        overlong: What becomes of longer examples.

    Raises:
        ValueError: If the other model has another tokenizer.
    """
    sequences: Any = _trained(job, max_length, overlong)
    tokenizer, against = job.encoder.tokenizer, job.policy
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    compared: Any = sequences
    if other is not None:
        if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"other is {other!r}, whose tokenizer is not the model's: token counts would differ"
            )
        against = job.load(other)
    else:
        compared = [None if sequence is None else _unprompted(sequence, begin) for sequence in sequences]

    def both(batch: list[int]) -> Tensor:
        given = _sums(job, job.policy, [sequences[place] for place in batch])
        alone = _sums(job, against, [compared[place] for place in batch])
        return torch.cat([given, alone[:, :1]], 1)

    lengths = [
        None if other is None else length for length, other in zip(_lengths(sequences), compared, strict=True)
    ]
    found = torch.from_numpy(numpy.array(job.over(lengths, 3, both))).double()
    known, scores = ~found[:, 0].isnan(), torch.full((len(found),), torch.nan, dtype=torch.float64)
    scores[known] = ratio_of(found[known, 0], found[known, 2], found[known, 1])
    return Result({"": _listed(scores)})


def _unprompted(sequence: Tokens, begin: int) -> Tokens | None:
    if bool(sequence.learn[0]):
        return None
    first = int(sequence.learn.nonzero()[0])
    return Tokens(
        torch.cat([torch.tensor([begin]), sequence.tokens[first:]]),
        torch.cat([torch.tensor([False]), sequence.learn[first:]]),
    )


def pass_rate(
    job: Job,
    *,
    reward: str,
    samples: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    passing: float = 1.0,
    seed: int = 0,
) -> Result:
    """Share of a model's samples that pass, with its 95 % Wilson interval.

    Args:
        job: Pass over the examples with a model.
        reward: Dotted name of a reward function, such as rewarm.exact_number.
        samples: Completions per prompt, >= 1.
        max_new_tokens: Most tokens per completion, >= 1.
        temperature: Temperature of the sampling, > 0.
        top_p: Probability mass that is sampled from, in (0, 1].
        passing: Least reward that passes.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is out of range, or a prompt leaves no room for its completion.
    """
    at_least(1, samples=samples)
    judge = load_reward(reward)
    generate = sample_from(job.policy.model, job.encoder, max_new_tokens, temperature, top_p)
    prompts = read_prompts(job.data.path, job.encoder)
    lengths = [len(prompts.tokens[number]) + max_new_tokens for number in job.data.numbers]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if job.context is not None and lengths[longest] > job.context:
        raise ValueError(
            f"{job.data.rows.where(job.data.numbers[longest])}: the prompt and {max_new_tokens} new tokens"
            f" take {lengths[longest]} positions, the model has {job.context}: lower --max-new-tokens"
        )

    def passed(batch: list[int]) -> Tensor:
        groups = sample_groups(
            prompts,
            [job.data.numbers[place] for place in batch],
            samples,
            # By content, so that the samples of an example do not depend on its place.
            [(int(job.data.ids[place][:15], 16) + seed) % 2**63 for place in batch],
            generate=generate,
            reward=judge,
            tokenizer=job.encoder.tokenizer,
        )
        return torch.tensor([[sum(r >= passing for r in group.rewards)] for group in groups])

    found = job.over([samples * length for length in lengths], 1, passed)[:, 0].tolist()
    low, high = zip(*(wilson_interval(k, samples) for k in found), strict=True)
    return Result(
        {
            "": [k / samples for k in found],
            "_passed": found,
            "_samples": [float(samples)] * len(found),
            "_low": list(low),
            "_high": list(high),
        }
    )


def angle(job: Job, *, prefix_weight: float = 8.0) -> Result:
    """Angle concentration of the question's hidden states and with the template's prefix; high goes first.

    Args:
        job: Pass over the examples with a model.
        prefix_weight: Weight of the template's prefix.

    Raises:
        ValueError: If the model has no `mlp` in its last layer, or a prompt is longer than its context.
    """
    mlp = getattr(decoder_layers(job.policy.model)[-1], "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ValueError(
            f"{type(job.policy.model).__name__} has no `mlp` in its last layer to take states from"
        )
    questions = [_question(job, number, row) for number, row in job.data]
    context = job.context
    for place, (tokens, _, _) in enumerate(questions):
        if context is not None and len(tokens) > context:
            where = job.data.rows.where(job.data.numbers[place])
            raise ValueError(f"{where}: the prompt takes {len(tokens)} positions, the model has {context}")
    seen: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def concentration(batch: list[int]) -> Tensor:
        tokens, question, prefix = zip(*(questions[place] for place in batch), strict=True)
        job.hidden(list(tokens))
        masks = (pad_sequence(list(masks), batch_first=True).to(job.device) for masks in (question, prefix))
        return angle_concentration(seen.pop(), *masks, prefix_weight=prefix_weight)[:, None]

    lengths = [len(tokens) if int(question.sum()) > 1 else None for tokens, question, _ in questions]
    found = job.over(lengths, 1, concentration)
    hook.remove()
    return Result({"": _listed(torch.from_numpy(numpy.array(found))[:, 0])})


def _question(job: Job, number: int, row: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a prompt as the template shows it; which are the question's, and which are in front of it."""
    rows, tokenizer = job.data.rows, job.encoder.tokenizer
    conversation = job.data.conversation(number, row)
    prompt: Any = conversation[0] if isinstance(conversation, tuple) else conversation or ""
    if isinstance(prompt, str):
        text, start, end = prompt, 0, len(prompt)
    else:
        turns = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        if not turns or not isinstance(turns[-1].get("content"), str):
            raise ValueError(f"{rows.where(number)}: there is no question in text before an answer")
        template = template_arguments(rows, number, row)
        job.encoder.prompt(turns, **template)  # refuses what the template does
        text, marked = (
            str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **template))
            for said in (turns, [*turns[:-1], {**turns[-1], "content": _MARK}])
        )
        before, mark, after = marked.partition(_MARK)
        if not mark or not text.startswith(before) or not text.endswith(after):
            raise ValueError(
                f"{rows.where(number)}: the chat template shows the question's frame otherwise each time"
            )
        start, end = len(before), len(text) - len(after)
    chat = not isinstance(prompt, str)
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    question = torch.tensor([first < end and last > start for first, last in offsets], dtype=torch.bool)
    prefix = torch.cumsum(question, 0) == 0
    return torch.tensor(encoded["input_ids"], dtype=torch.long), question, prefix


def prototype_distance(
    job: Job,
    *,
    prototypes: int = 100,
    passes: int = 3,
    seed: int = 0,
    max_length: int | None = None,
    overlong: Overlong = "error",
) -> Result:
    """One minus the cosine of an example's embedding (mean last hidden state) and its nearest prototype's.

    Args:
        job: Pass over the examples with a model.
        prototypes: How many prototypes to fit, >= 1.
        passes: Passes of k-means over the examples, >= 1.
        seed: Seed of the prototypes to begin with.
        max_length: Most positions per example, >= 1; without it, the model's context.
        overlong: What becomes of longer examples.

    Raises:
        ValueError: If an argument is out of range.
    """
    at_least(1, passes=passes)
    sequences: Any = job.fitting(job.data.sequences(job.encoder), max_length, overlong)
    known = [place for place, sequence in enumerate(sequences) if sequence is not None]
    if not 1 <= prototypes <= len(known):
        raise ValueError(
            f"prototypes is {prototypes}; it must be in 1 to {len(known)}, the number of examples"
        )

    def embeddings(batch: list[int]) -> Tensor:
        hidden, real = job.hidden([sequences[place].tokens[: job.context] for place in batch])
        return (hidden.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    width = job.policy.model.config.get_text_config().hidden_size
    lengths = [None if sequence is None else len(sequence.tokens) for sequence in sequences]
    found = job.over(lengths, width, embeddings)
    # In an order of their own, so that that of the data plays no part.
    known.sort(key=job.data.ids.__getitem__)
    size = max(_CHUNK, 2 * prototypes)
    chunks = [known[start : start + size] for start in range(0, len(known), size)]
    batches = (torch.from_numpy(found[chunk]) for _ in range(passes) for chunk in chunks)
    fitted = fit_prototypes(batches, prototypes, seed=seed)
    scores: Scores = [None] * len(sequences)
    for chunk in chunks:
        for place, distance in zip(
            chunk, fitted.distance(torch.from_numpy(found[chunk])).tolist(), strict=True
        ):
            scores[place] = distance
    return Result({"": scores})
