"""`rewarm pairs`: preference pairs from verified samples, or from answers at hand."""

import json
import random
from collections.abc import Iterator
from typing import Any

from rich.progress import track
from transformers import AutoModelForCausalLM

from rewarm.checkpoints.placing import check_free, put_in_place
from rewarm.checks import above, at_least
from rewarm.rollouts.rewards import load_reward
from rewarm.rollouts.sampling import read_prompts, sample_from, sample_groups
from rewarm.text.encoding import Encoder, load_tokenizer
from rewarm.text.formats import PROMPT_COLUMNS, Row, Rows, as_prompt, responses_of

_PROMPTS_AT_ONCE = 64


def pairs(
    *,
    prompts: str,
    output: str,
    model: str | None = None,
    reward: str | None = None,
    chosen: str | None = None,
    samples: int = 8,
    pairs_per_prompt: int = 1,
    min_gap: float = 0.5,
    limit: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Make preference pairs from a model's verified samples, or from answers at hand.

    What is written are `prompt`, `chosen`, `rejected` rows for `PreferenceData`. Semi-on-policy pairs
    (Light-R1, arXiv:2503.10460) take the rejected answer from the model's own verified-wrong samples and the
    chosen one from a column with a better answer.

    Args:
        prompts: Rows with a prompt. With columns `responses` and `rewards` (lists of equal length) nothing is
            sampled.
        output: JSON lines file to write; must not be there yet.
        model: Hugging Face folder to sample from.
        reward: Dotted name of a reward function, such as rewarm.exact_number.
        chosen: Column to take the chosen answer from, instead of the best sample.
        samples: Completions per prompt, >= 1.
        pairs_per_prompt: Most pairs from one prompt, >= 1.
        min_gap: Least difference between the rewards of a pair, > 0. An answer from a column counts as reward
            1.
        limit: Take the first so many prompts only.
        max_new_tokens: Most tokens per completion, >= 1.
        temperature: Temperature of the sampling, > 0.
        seed: Seed of the sampling, and of which pairs are taken.

    Raises:
        ValueError: If the output is there, an argument is missing or out of range, or no prompt gives a pair.
    """
    check_free(output)
    at_least(1, samples=samples, pairs_per_prompt=pairs_per_prompt)
    above(0, min_gap=min_gap)  # equals would be preferred to each other
    rows = Rows(prompts)
    if "responses" in rows.columns:
        answered = _given(rows, limit)
    elif model is None or reward is None:
        raise ValueError(
            "give --model and --reward to sample from, or prompts with columns responses and rewards"
        )
    else:
        answered = _sampled(
            prompts, model, load_reward(reward), samples, limit, max_new_tokens, temperature, seed
        )
    rng = random.Random(seed)
    found: list[Row] = []
    seen = 0
    for row, responses, rewards in answered:
        seen += 1
        best = None
        if chosen is not None:
            best = row.get(chosen)
            if not isinstance(best, str):
                raise ValueError(f"{prompts}: row {seen - 1} has no text in column {chosen!r}")
        found += _pairs(row, responses, rewards, best, pairs_per_prompt, min_gap, rng)
    if not found:
        raise ValueError(
            f"{prompts}: none of {seen} prompts has two answers whose rewards differ by {min_gap}"
        )
    with put_in_place(output) as place:
        place.write_text("".join(json.dumps(pair) + "\n" for pair in found))
    print(f"{output}: {len(found)} pairs from {seen} prompts")  # noqa: T201


def _pairs(
    row: Row,
    responses: list[str],
    rewards: list[float],
    best: str | None,
    most: int,
    min_gap: float,
    rng: random.Random,
) -> list[Row]:
    answers = sorted(dict(zip(responses, rewards, strict=True)).items(), key=lambda item: item[1])
    answers = [(text, reward) for text, reward in answers if text]
    good = [(best, 1.0)] if best is not None else [answer for answer in answers if answer[1] > answers[0][1]]
    found = [
        (win, loss) for win in good for loss in answers if win[1] - loss[1] >= min_gap and win[0] != loss[0]
    ]
    rng.shuffle(found)
    found.sort(key=lambda pair: -(pair[0][1] - pair[1][1]))
    return [
        {**row, "chosen": win[0], "rejected": loss[0], "margin": win[1] - loss[1]}
        for win, loss in found[:most]
    ]


def _given(rows: Rows, limit: int | None) -> Iterator[tuple[Row, list[str], list[float]]]:
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        responses, rewards = responses_of(rows, number, row)
        yield _kept(rows, number, row), responses, rewards


def _sampled(
    path: str,
    folder: str,
    reward: Any,
    samples: int,
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[tuple[Row, list[str], list[float]]]:
    encoder = Encoder(load_tokenizer(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    rows = Rows(path)
    kept = [_kept(rows, number, row) for number, row in enumerate(rows)]
    prompts = read_prompts(path, encoder, limit)
    generate = sample_from(model, encoder, max_new_tokens, temperature)
    chunks = [range(len(prompts))[i : i + _PROMPTS_AT_ONCE] for i in range(0, len(prompts), _PROMPTS_AT_ONCE)]
    for place, chunk in enumerate(track(chunks, "sampling pairs")):
        groups = sample_groups(
            prompts,
            chunk,
            samples,
            seed + place,
            generate=generate,
            reward=reward,
            tokenizer=encoder.tokenizer,
        )
        for group in groups:
            yield kept[group.prompt], group.texts, group.rewards


def _kept(rows: Rows, number: int, row: Row) -> Row:
    """The prompt and whatever else is not consumed."""
    used = {*PROMPT_COLUMNS, "responses", "rewards", "completion"}
    return {"prompt": as_prompt(rows, number, row)} | {k: v for k, v in row.items() if k not in used}
