"""Turns text and conversations into tokens with a mask of what is learnt."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rewarm.text.formats import Messages


class Tokens(NamedTuple):
    """A tokenised sequence.

    Attributes:
        tokens: Numbers of the tokens. int64, shape (T + 1,). All but the last are inputs, all but the first
            may be targets.
        learn: Whether a token is a target. Shape (T + 1,), bool.
        extra: Further values of each target that a loss needs, such as `weights`; each of shape (T, ...).

    Example:
        >>> sequence = Tokens(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]))
        >>> sequence.positions, sequence.without_end(1).tokens
        (2, tensor([5, 6]))
    """

    tokens: Tensor
    learn: Tensor
    extra: Mapping[str, Tensor] = {}

    @property
    def positions(self) -> int:
        """Number of positions that the sequence takes in a row: one less than its tokens."""
        return len(self.tokens) - 1

    def without_end(self, positions: int) -> "Tokens":
        """Return the first so many positions."""
        extra = {name: values[:positions] for name, values in self.extra.items()}
        return Tokens(self.tokens[: positions + 1], self.learn[: positions + 1], extra)

    def without_start(self, count: int, after: int = 0) -> "Tokens":
        """Return it without so many tokens after its first `after` ones (a BOS token)."""
        tokens, learn = (torch.cat([v[:after], v[after + count :]]) for v in (self.tokens, self.learn))
        return Tokens(tokens, learn, {name: values[count:] for name, values in self.extra.items()})


def load_tokenizer(tokenizer: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that knows its end-of-sequence token and text offsets.

    Args:
        tokenizer: Hugging Face folder or id of the tokenizer.

    Raises:
        ValueError: If there is no such tokenizer, or it lacks an EOS token or offsets.

    Example:
        >>> from rewarm.commands.init import character_tokenizer
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = character_tokenizer(["1+2="]).save_pretrained(folder)
        ...     load_tokenizer(folder).eos_token
        '</s>'
    """
    if Path(tokenizer).exists() and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer is {tokenizer!r}: the folder has no tokenizer.json")
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"tokenizer is {tokenizer!r}, which comes with code of its own, and that is not run"
            ) from error
        raise ValueError(
            f"tokenizer is {tokenizer!r}: no such folder, and not on the Hub or no network"
        ) from error
    if loaded.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer!r} has no eos_token: a model trained with it would never stop"
        )
    if not loaded.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer!r} has no fast version, which gives the offsets that masks need"
        )
    if loaded.pad_token_id is None:
        loaded.pad_token = (
            loaded.eos_token
        )  # padding is told by position, never by token, so sharing the id is harmless
    return loaded


class Encoder:
    """Tokenises prompts and completions with one tokenizer, and counts what to be careful about.

    Args:
        tokenizer: A fast tokenizer with an EOS token.

    Attributes:
        straddled: Number of sequences that had a token across the boundary of prompt and completion. Such a
            token counts as completion; at generation the prompt ends in other tokens there.

    Example:
        >>> from rewarm.commands.init import character_tokenizer
        >>> encoder = Encoder(character_tokenizer(["1+2="]))
        >>> encoder.pair("1+1=", "2").learn  # the completion, and the end
        tensor([False, False, False, False,  True,  True])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.straddled = 0
        templates = tokenizer.chat_template or ""
        template = templates if isinstance(templates, str) else templates.get("default", "")
        self._has_generation_tags = "{% generation" in template.replace("{%-", "{%")
        self._adds_eos = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def prompt(self, prompt: str | Messages, **template: Any) -> list[int]:
        """Return the tokens after which a completion begins.

        Args:
            prompt: Text, or messages for the chat template.
            **template: `tools` and other arguments of the chat template.
        """
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
            return ids[:-1] if self._adds_eos else ids
        rendered = self._render(prompt, add_generation_prompt=True, **template)
        return self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]

    def pair(
        self, prompt: str | Messages, completion: str | Messages, *, ends: bool = True, **template: Any
    ) -> Tokens:
        """Tokenise a prompt with its completion; the completion and its end are learnt.

        Args:
            prompt: Text or messages.
            completion: Text or messages, of the same kind as the prompt.
            ends: Whether a completion of text is over; a step of a longer one is not, and gets no EOS token.
            **template: `tools` and other arguments of the chat template.

        Raises:
            ValueError: If the completion is empty, or the chat template changes the prompt once it follows.
        """
        if not completion or not (isinstance(completion, str) or any(map(_says_something, completion))):
            raise ValueError("the completion is empty")
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._text_pair(prompt, completion, ends)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompt and completion must both be text or both be messages")
        before = self._render(prompt, add_generation_prompt=True, **template)
        whole = self._render([*prompt, *completion], **template)
        if not whole.startswith(before):
            raise ValueError(
                "the chat template renders the prompt differently once the completion follows, so the"
                " completion cannot be located"
            )
        return self._spans(whole, [(len(before), len(whole))], [1.0])

    def conversation(
        self, messages: Messages, *, turns: Literal["all", "last"] = "all", **template: Any
    ) -> Tokens:
        """Tokenise a conversation; what the assistant says, and the end of each of its turns, is learnt.

        Args:
            messages: One of the assistant may have a `weight`: 0 for not learnt, else a factor of its loss.
            turns: Learn all of the assistant's turns, or its last one.
            **template: `tools` and other arguments of the chat template.

        Raises:
            ValueError: If the assistant says nothing, a weight is below 0, or the chat template changes
                earlier turns when later ones are added.
        """
        spoken = [message for message in messages if message["role"] == "assistant"]
        weights = [weight_of(message.get("weight", 1.0)) for message in spoken]
        if turns == "last":
            weights[:-1] = [0.0] * (len(weights) - 1)
        if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
            raise ValueError("no message of role 'assistant' says anything: there is nothing to learn")
        if self._has_generation_tags:
            encoded = self._apply_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template
            )
            tokens, said = encoded["input_ids"], torch.tensor(encoded["assistant_masks"])
            return self._ended(tokens, self._weigh_turns(said, weights))
        whole, spans = self._render(messages, **template), []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:turn], add_generation_prompt=True, **template)
                after = self._render(messages[: turn + 1], **template)
                if not after.startswith(before) or not whole.startswith(after):
                    raise ValueError(
                        "the chat template renders earlier turns differently once later ones follow, so the"
                        " assistant's words cannot be found: mark them with {% generation %} in the template"
                    )
                spans.append((len(before), len(after)))
        return self._spans(whole, spans, weights)

    def document(self, text: str) -> Tokens:
        """Tokenise a text; everything is learnt, its end too."""
        return self._text_pair("", text)

    def segments(self, segments: Sequence[tuple[str, float]]) -> Tokens:
        """Tokenise a text in pieces, each with its weight; the end is learnt with the last piece.

        A token across a boundary belongs to the piece that it ends in.

        Args:
            segments: Pieces of the text, and for each a weight: 0 for not learnt, else a factor of its loss.

        Raises:
            ValueError: If nothing is learnt, or a weight is below 0.
        """
        weights = [weight_of(weight) for _, weight in segments]
        if not any(weight and text for (text, _), weight in zip(segments, weights, strict=True)):
            raise ValueError("no piece of the text is learnt")
        whole = "".join(text for text, _ in segments)
        ids, offsets = self._with_offsets(whole, ends=True)
        ends = list(itertools.accumulate(len(text) for text, _ in segments))
        if any(start < end < last for start, last in offsets for end in ends):
            self.straddled += 1
        token_weights = [weights[bisect_left(ends, last)] if last else 0.0 for _, last in offsets]
        token_weights[-1] = weights[-1]
        return _weighted(torch.tensor(ids), torch.tensor(token_weights))

    def _text_pair(self, prompt: str, completion: str, ends: bool = True) -> Tokens:
        ids, offsets = self._with_offsets(prompt + completion, ends)
        if prompt and any(start < len(prompt) < end for start, end in offsets):
            self.straddled += 1
        learn = [end > len(prompt) for _, end in offsets]
        learn[-1] = True
        return Tokens(torch.tensor(ids), torch.tensor(learn))

    def _with_offsets(self, text: str, ends: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise a text, with one EOS token if it ends, and none if it doesn't."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        if ends and not ended:
            return [*ids, self.tokenizer.eos_token_id], [*offsets, (len(text),) * 2]
        return (ids, offsets) if ends or not ended else (ids[:-1], offsets[:-1])

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False, **template: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the data are messages, but the tokenizer has no chat_template: set one or give text"
            )
        if not messages:
            return ""
        return str(
            self._apply_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template
            )
        )

    def _apply_template(self, messages: Messages, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _weigh_turns(self, said: Tensor, weights: list[float]) -> Tensor:
        """Give each stretch of what the assistant says its weight."""
        if all(weight == 1.0 for weight in weights):
            return said.float()
        begins = said.diff(prepend=said.new_zeros(1)) == 1
        if int(begins.sum()) != len(weights):
            raise ValueError(
                f"the chat template marks {int(begins.sum())} stretches of text for {len(weights)} turns of"
                " the assistant, so they cannot have weights of their own"
            )
        return torch.tensor([0.0, *weights])[begins.cumsum(0)] * said

    def _spans(self, text: str, spans: list[tuple[int, int]], weights: list[float]) -> Tokens:
        """Tokenise a rendered text; what lies in the spans is learnt, up to the EOS that ends a turn."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learn = torch.zeros(len(ids))
        straddles = False
        for (start, end), weight in zip(spans, weights, strict=True):
            places = [place for place, (first, last) in enumerate(offsets) if last > start and first < end]
            straddles |= bool(places) and offsets[places[0]][0] < start
            ends = [place for place in places if ids[place] == self.tokenizer.eos_token_id]
            if ends and not text[offsets[ends[-1]][1] : end].strip():
                # Templates put a line break behind EOS, which generation never gets to.
                places = [place for place in places if place <= ends[-1]]
            learn[places] = weight
        self.straddled += straddles
        return self._ended(ids, learn)

    def _ended(self, ids: list[int], weights: Tensor) -> Tokens:
        """Learn the EOS token of each turn, and add one to a last turn without: generation has to stop."""
        tokens, eos = torch.tensor(ids), self.tokenizer.eos_token_id
        ends = (tokens[1:] == eos) & (weights[1:] == 0.0)
        weights[1:] = torch.where(ends, weights[:-1], weights[1:])
        if len(weights) and weights[-1] and tokens[-1] != eos:
            tokens, weights = (
                torch.cat([tokens, tokens.new_tensor([eos])]),
                torch.cat([weights, weights[-1:]]),
            )
        return _weighted(tokens, weights)


def weight_of(value: Any) -> float:
    """Return a weight of a loss as a float.

    Args:
        value: A number as a user wrote it, finite and >= 0.

    Raises:
        ValueError: If the value is no finite number, or below 0.

    Example:
        >>> weight_of(1), weight_of(0.5)
        (1.0, 0.5)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise ValueError(f"weight is {value!r}; it must be a finite number of at least 0")
    return float(value)


def _weighted(tokens: Tensor, weights: Tensor) -> Tokens:
    learn = weights > 0.0
    plain = bool((weights[learn] == 1.0).all())
    return Tokens(tokens, learn, {} if plain else {"weights": weights[1:]})


def _says_something(message: dict[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))
