"""Which tokens are learnt, against the text they decode to."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rewarm.text.encoding import Encoder, load_tokenizer
from tests import tiny

EOS = 1
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is 1+1?"}
ASSISTANT = {"role": "assistant", "content": "2."}
CHAT = [
    SYSTEM,
    USER,
    ASSISTANT,
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "4."},
]
# Block tags swallow a line break behind them, so it stands in an expression.
HEAD, TAIL = "{% for m in messages %}{{ m['role'][0] }}:", "{% if add_generation_prompt %}a:{% endif %}"
PLAIN = (
    HEAD + "{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}" + TAIL
)
TAGGED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}" + TAIL
)
words = st.text(tiny.CHARACTERS, min_size=1, max_size=30)


def encoder(chat_template=None):
    return Encoder(tiny.build_tokenizer(chat_template))


def special(template, chat_template=None):
    """A tokenizer whose post-processor adds special tokens to every text."""
    tokenizer = tiny.build_tokenizer(chat_template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


ADDED = ["$A", "<s> $A", "$A </s>", "<s> $A </s>"]


def bpe():
    """A tokenizer of several characters per token, one of them the word `sum is`."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    backend.train_from_iterator(["the sum is 12", "the sum is 7", "a sum is", "0123456789"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text(encoder, tokens):
    return encoder.tokenizer.decode(tokens)


def learnt(encoder, sequence):
    return text(encoder, sequence.tokens[sequence.learn])


def given_only(encoder, sequence):
    return text(encoder, sequence.tokens[~sequence.learn])


def weights(sequence):
    """What each token weighs."""
    weights = sequence.extra.get("weights", torch.ones(sequence.positions))
    return torch.where(sequence.learn[1:], weights, 0.0)


# --- pieces and weights -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(words, st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=6))
@settings(deadline=None)
def test_each_token_has_the_weight_of_its_piece_and_the_end_that_of_the_last(pieces):
    encode = encoder()
    if not any(weight for _, weight in pieces):
        with pytest.raises(ValueError, match="no piece of the text is learnt"):
            encode.segments(pieces)
        return
    sequence = encode.segments(pieces)
    expected = [weight for piece, weight in pieces for _ in piece] + [pieces[-1][1]]
    assert weights(sequence).tolist() == expected[1:]
    assert text(encode, sequence.tokens) == "".join(piece for piece, _ in pieces) + "</s>"


def test_a_prompt_and_its_completion_are_two_pieces():
    encode = encoder()
    one, other = encode.segments([("1+1=", 0.0), ("2", 1.0)]), encode.pair("1+1=", "2")
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.learn, other.learn)
    assert one.extra == other.extra == {}


@pytest.mark.parametrize("added", ADDED)
def test_pieces_begin_with_one_bos_and_end_with_one_eos_that_is_learnt(added):
    encode = Encoder(special(added))
    sequence = encode.segments([("ab", 0.0), ("cd", 1.0)])
    assert learnt(encode, sequence) == "cd</s>"
    assert (sequence.tokens == encode.tokenizer.bos_token_id).sum() == int("<s>" in added)


def test_a_token_across_pieces_belongs_to_the_one_that_it_ends_in():
    encode = Encoder(bpe())
    # One token.
    assert encode.segments([("the sum is 1", 0.0), ("2", 1.0)]).learn.tolist() == [True, True]
    assert encode.segments([("the sum is 1", 1.0), ("2", 0.0)]).learn.tolist() == [False, False]
    assert encode.straddled == 2


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_turns_have_the_weights_of_their_messages_with_their_ends(template):
    encode = encoder(template)
    chat = [*CHAT[:2], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 0.25}]
    sequence = encode.conversation(chat)
    assert learnt(encode, sequence) == "4.</s>"
    assert weights(sequence)[sequence.learn[1:]].unique().tolist() == [0.25]
    assert torch.equal(sequence.tokens, encode.conversation(CHAT).tokens)
    last = encode.conversation(CHAT, turns="last")
    assert learnt(encode, last) == "4.</s>"
    assert last.extra == {}
    assert learnt(encode, encode.conversation(CHAT)) == "2.</s>4.</s>"


def test_turns_that_a_template_runs_together_cannot_have_weights():
    joined = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    chat = [ASSISTANT, {**ASSISTANT, "weight": 0}]
    with pytest.raises(ValueError, match="marks 1 stretches of text for 2 turns of the assistant"):
        encoder(joined).conversation(chat)


@pytest.mark.parametrize("weight", [-1, "1", None, True, float("nan"), float("inf")])
def test_a_wrong_weight_is_named(weight):
    with pytest.raises(ValueError, match=f"weight is {weight!r}; it must be a finite number"):
        encoder(PLAIN).conversation([USER, {**ASSISTANT, "weight": weight}])


def test_a_cut_sequence_keeps_what_belongs_to_each_target():
    whole = encoder().segments([("abc", 0.0), ("de", 0.5), ("fg", 1.0)])
    by_token = dict(zip(whole.tokens[1:].tolist(), whole.extra["weights"].tolist(), strict=True))
    for cut in (whole.without_end(4), whole.without_start(2), whole.without_start(3, after=1)):
        assert len(cut.tokens) == len(cut.learn) == cut.positions + 1
        assert cut.extra["weights"].tolist() == [by_token[token] for token in cut.tokens[1:].tolist()]
    assert text(encoder(), whole.without_end(4).tokens) == "abcde"
    assert text(encoder(), whole.without_start(3, after=1).tokens) == "aefg</s>"


# --- text -------------------------------------------------------------------------------------------------


@given(words, words)
@settings(deadline=None)
def test_of_a_text_pair_the_completion_and_eos_are_learnt_and_nothing_else(prompt, completion):
    encode = encoder()
    sequence = encode.pair(prompt, completion)
    assert learnt(encode, sequence) == completion + "</s>"
    assert given_only(encode, sequence) == prompt
    assert sequence.positions == len(prompt) + len(completion)
    assert encode.straddled == 0


@pytest.mark.parametrize("added", ADDED)
def test_the_prompt_of_a_pair_is_what_generation_starts_from(added):
    encode = Encoder(special(added))
    sequence = encode.pair("1+1=", "2")
    bos = "<s>" if "<s>" in added else ""
    assert learnt(encode, sequence) == "2</s>"
    assert given_only(encode, sequence) == bos + "1+1="
    assert sequence.tokens[~sequence.learn].tolist() == encode.prompt("1+1=")


@pytest.mark.parametrize("added", ADDED)
def test_a_text_begins_with_one_bos_and_ends_with_one_eos(added):
    encode = Encoder(special(added))
    sequences = [encode.document("abc"), encode.pair("a", "bc")]
    # Data may bring their own EOS.
    sequences += [] if "</s>" in added else [encode.document("abc</s>"), encode.pair("a", "bc</s>")]
    for sequence in sequences:
        assert text(encode, sequence.tokens) == ("<s>" if "<s>" in added else "") + "abc</s>"


@pytest.mark.parametrize("added", ADDED)
def test_an_eos_that_the_prompt_itself_ends_with_stays(added):
    encode = Encoder(special(added))
    sequence = encode.pair("one</s>", "two")
    assert sequence.tokens[~sequence.learn].tolist() == encode.prompt("one</s>")
    assert text(encode, encode.prompt("one</s>")).endswith("one</s>")


def test_of_a_document_every_target_is_learnt():
    encode = Encoder(special("<s> $A"))
    sequence = encode.document("a b\nc")
    assert sequence.learn[1:].all()
    assert sequence.tokens[-1] == EOS
    assert encode.straddled == 0


def test_a_token_across_the_boundary_is_learnt_and_counted():
    encode = Encoder(bpe())
    ids = encode.tokenizer("the sum is 12")["input_ids"]
    # The prompt ends within a token of the whole text.
    cut = len(encode.tokenizer.decode(ids[:1]).strip()) - 1
    prompt, completion = "the sum is 12"[:cut], "the sum is 12"[cut:]
    sequence = encode.pair(prompt, completion)
    assert encode.straddled == 1
    assert sequence.tokens.tolist() == [*ids, EOS]
    assert sequence.learn.all()
    encode.pair("the sum is", "\n12")
    assert encode.straddled == 1


def test_a_completion_of_several_characters_per_token_is_found_exactly():
    encode = Encoder(bpe())
    sequence = encode.pair("the sum is\n", "the sum is 7")
    tail = encode.tokenizer("the sum is 7")["input_ids"]
    assert sequence.tokens[sequence.learn].tolist() == [*tail, EOS]


# --- messages ---------------------------------------------------------------------------------------------

TEMPLATES = {"without tags": PLAIN, "with tags": TAGGED}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_a_conversation_what_the_assistant_says_is_learnt_with_each_eos(template):
    encode = encoder(template)
    sequence = encode.conversation(CHAT)
    assert text(encode, sequence.tokens) == "s:be brief\nu:what is 1+1?\na:2.</s>\nu:and 2+2?\na:4.</s>\n"
    assert learnt(encode, sequence) == "2.</s>4.</s>"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_a_message_pair_the_completion_is_learnt_and_the_rest_is_the_prompt_of_generation(template):
    encode = encoder(template)
    sequence = encode.pair([SYSTEM, USER], [ASSISTANT])
    assert learnt(encode, sequence) == "2.</s>"
    prompt = encode.prompt([SYSTEM, USER])
    assert text(encode, prompt) == "s:be brief\nu:what is 1+1?\na:"
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    assert not sequence.learn[: len(prompt)].any()
    assert sequence.learn[len(prompt)]


@given(st.lists(words, min_size=1, max_size=5), st.booleans())
@settings(deadline=None, max_examples=40)
def test_templates_with_and_without_tags_give_the_same_mask(contents, ends_with_user):
    messages = []
    for content in contents:
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": content + "!"}]
    messages += [USER] if ends_with_user else []
    plain = encoder(PLAIN).conversation(messages)
    tagged = encoder(TAGGED).conversation(messages)
    assert plain.tokens.tolist() == tagged.tokens.tolist()
    assert plain.learn.tolist() == tagged.learn.tolist()


@pytest.mark.parametrize(
    "template",
    [
        # No EOS at all.
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
        # The same with tags, which leave the line break out.
        "{% for m in messages %}{{ m['role'][0] }}:{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
        # EOS behind the tags.
        "{% for m in messages %}{{ m['role'][0] }}:{% if m['role'] == 'assistant' %}{%- generation -%}"
        "{{ m['content'] }}{%- endgeneration -%}</s>{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
    ],
    ids=["no EOS", "no EOS in tags", "EOS behind tags"],
)
def test_the_last_turn_learns_an_eos_whatever_the_template_does(template):
    encode = encoder(template)
    for sequence in (encode.conversation([USER, ASSISTANT]), encode.pair([USER], [ASSISTANT])):
        assert learnt(encode, sequence).replace("\n", "") == "2.</s>"
        assert (sequence.tokens == EOS).sum() == 1


def test_a_turn_of_the_user_that_comes_last_gets_no_eos():
    encode = encoder(PLAIN)
    sequence = encode.conversation([USER, ASSISTANT, USER])
    assert text(encode, sequence.tokens).endswith("u:what is 1+1?\n")
    assert learnt(encode, sequence) == "2.</s>"


def test_an_eos_within_what_is_said_is_learnt_with_the_rest():
    encode = encoder(PLAIN)
    said = {"role": "assistant", "content": "a</s>b"}
    assert learnt(encode, encode.conversation([USER, said])) == "a</s>b</s>"


def test_a_template_that_writes_bos_gives_one_bos():
    template = "<s>" + PLAIN
    encode = Encoder(special("<s> $A", template))
    bos = encode.tokenizer.bos_token_id
    for tokens in (
        encode.conversation(CHAT).tokens,
        encode.pair([USER], [ASSISTANT]).tokens,
        torch.tensor(encode.prompt([USER])),
    ):
        assert tokens[0] == bos
        assert (tokens == bos).sum() == 1


def test_tools_and_keywords_reach_the_template():
    template = "{% if tools %}tools:{{ tools[0]['name'] }}\n{% endif %}{% if brief %}brief\n{% endif %}"
    encode = encoder(template + PLAIN)
    options = {"tools": [{"name": "add"}], "brief": True}
    assert text(encode, encode.prompt([USER], **options)).startswith("tools:add\nbrief\nu:")
    assert learnt(encode, encode.pair([USER], [ASSISTANT], **options)) == "2.</s>"
    assert text(encode, encode.conversation(CHAT, **options).tokens).startswith("tools:add\nbrief\ns:")


def test_several_named_templates_are_taken_as_transformers_takes_them():
    encode = encoder({"default": TAGGED, "rag": "{{ documents }}"})
    assert learnt(encode, encode.conversation(CHAT)) == "2.</s>4.</s>"
    assert learnt(encode, encode.pair("a", "b")) == "b</s>"


# --- what cannot be encoded ---------------------------------------------------------------------------------

FORGETFUL = (  # shows the first user turn only while nothing follows it
    "{% for m in messages %}{% if m['role'] != 'user' or loop.last %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "act", "named"),
    [
        (None, lambda e: e.pair("1+1=", ""), "the completion is empty"),
        (PLAIN, lambda e: e.pair([USER], []), "the completion is empty"),
        (
            PLAIN,
            lambda e: e.pair([USER], [{"role": "assistant", "content": ""}]),
            "the completion is empty",
        ),
        (PLAIN, lambda e: e.pair("1+1=", [ASSISTANT]), "must both be text or both be messages"),
        (PLAIN, lambda e: e.pair([USER], "2"), "must both be text or both be messages"),
        (
            PLAIN,
            lambda e: e.conversation([USER]),
            "no message of role 'assistant' says anything",
        ),
        (
            PLAIN,
            lambda e: e.conversation([USER, {"role": "assistant", "content": ""}]),
            "no message of role 'assistant' says anything",
        ),
        (None, lambda e: e.prompt([USER]), "the tokenizer has no chat_template"),
        (None, lambda e: e.pair([USER], [ASSISTANT]), "the tokenizer has no chat_template"),
        (None, lambda e: e.conversation(CHAT), "the tokenizer has no chat_template"),
        (
            FORGETFUL,
            lambda e: e.conversation(CHAT),
            "renders earlier turns differently once later ones follow",
        ),
        (
            FORGETFUL,
            lambda e: e.pair([USER], [ASSISTANT]),
            "renders the prompt differently once the completion",
        ),
        (
            STRICT,
            lambda e: e.conversation(CHAT),
            "the chat template refuses the messages: the user must begin",
        ),
        (STRICT, lambda e: e.prompt([SYSTEM]), "the chat template refuses the messages: the user must begin"),
        (
            STRICT + TAGGED,
            lambda e: e.conversation(CHAT),
            "the chat template refuses the messages: the user must begin",
        ),
    ],
)
def test_what_cannot_be_encoded_says_why(template, act, named):
    with pytest.raises(ValueError, match=named):
        act(encoder(template))


def test_a_template_that_forgets_is_fine_for_the_turn_that_it_shows():
    encode = encoder(FORGETFUL.replace("or loop.last", "or loop.first"))
    assert learnt(encode, encode.conversation([USER, ASSISTANT])) == "2.</s>"


# --- tokenizers -------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_with_its_template(tmp_path):
    encode = Encoder(load_tokenizer(tiny.save_tokenizer(tmp_path / "t", PLAIN)))
    assert learnt(encode, encode.conversation(CHAT)) == "2.</s>4.</s>"


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == EOS


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("none", "no such folder, and not on the Hub or no network"),
        ("empty", "the folder has no tokenizer.json"),
        ("endless", "has no eos_token: a model trained with it would never stop"),
    ],
)
def test_a_tokenizer_that_will_not_do_is_named(name, named, tmp_path):
    (tmp_path / "empty").mkdir()
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    config = tmp_path / "endless" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": None}))
    with pytest.raises(ValueError, match=rf"tokenizer (is )?'{tmp_path / name}'.* {named}"):
        load_tokenizer(str(tmp_path / name))
