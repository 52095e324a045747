import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewarm.commands.init import bpe_tokenizer, character_tokenizer, init
from tests import tiny


def config_file(tmp_path):
    fields = {
        k: v
        for k, v in tiny.LLAMA.items()
        if k not in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
    }
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def test_the_folder_loads_with_transformers_and_its_tokenizer_fits(tmp_path):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sums(20))
    init(output=str(tmp_path / "hf"), config=config_file(tmp_path), tokenizer="characters", text=[text])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("3+4=")["input_ids"]) == "3+4="


def test_the_same_seed_gives_the_same_weights(tmp_path):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sums(20))
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        init(
            output=str(tmp_path / name),
            config=config_file(tmp_path),
            tokenizer="characters",
            text=[text],
            seed=seed,
        )
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_at_hand_is_linked_not_copied(tmp_path):
    from rewarm.lightning_modules.policy import build_model

    build_model(tiny.LLAMA).save_pretrained(tmp_path / "mine")
    init(output=str(tmp_path / "run" / "hf"), model=str(tmp_path / "mine"))
    assert (tmp_path / "run" / "hf").resolve() == (tmp_path / "mine").resolve()
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").config.vocab_size
        == tiny.LLAMA["vocab_size"]
    )


@pytest.mark.parametrize("text", ["line one\nline two", "tabs\t and  spaces", "12+3=15 umlaut \u00fc"])
def test_tokenizers_give_text_back(text):
    for tokenizer in (character_tokenizer([text]), bpe_tokenizer([text] * 3, 300)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bpe_keeps_digits_apart():
    tokenizer = bpe_tokenizer(["1234 1234 1234 hello hello hello"] * 10, 400)
    assert [tokenizer.decode([i]) for i in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]
    assert len(tokenizer(" hello")["input_ids"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --model"),
        ({"model": "nowhere"}, "no such Hugging Face folder"),
        ({"config": "nowhere.yaml", "text": ["t"]}, "config nowhere.yaml: no such file"),
    ],
)
def test_wrong_input_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        init(output=str(tmp_path / "hf"), **options)
    assert not (tmp_path / "hf").exists()


def test_too_small_a_vocabulary_and_an_existing_folder_are_refused(tmp_path):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sums(5))
    with pytest.raises(ValueError, match="vocab_size is 100"):
        init(output=str(tmp_path / "hf"), config=config_file(tmp_path), vocab_size=100, text=[text])
    with pytest.raises(ValueError, match="no column"):
        init(output=str(tmp_path / "hf"), config=config_file(tmp_path), text=[text], column=["nope"])
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        init(output=str(tmp_path / "hf"), config=config_file(tmp_path), text=[text])
