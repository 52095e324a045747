"""What `rewarm score` makes of rows of every format, and the file of what is finished."""

import math

import pytest
import torch

from rewarm.scoring.scored_data import Finished, ScoredData, part_of
from rewarm.text.encoding import Encoder
from tests import tiny

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
CHAT = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]


def texts(data, part):
    return list(data.texts(part))


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2"),
        ({"question": "abc?", "answer": "9"}, "abc?\n", "9"),
        ({"text": "abc"}, "", "abc"),
        (PAIR, "1+1=", "2"),
        ({"prompt": "1+1=", "responses": ["3", "2"], "rewards": [0.0, 1.0]}, "1+1=", "2"),
        ({"prompt": "1+1=", "answer": "2"}, "1+1=", ""),
        ({"messages": CHAT}, "abc", "de"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "abc", "de"),
    ],
)
def test_rows_of_every_format_have_their_parts(tmp_path, row, prompt, completion):
    data = ScoredData(tiny.write_jsonl(tmp_path / "a.jsonl", [row]))
    assert (texts(data, "prompt"), texts(data, "completion")) == ([prompt], [completion])
    (sequence,) = data.sequences(Encoder(tiny.build_tokenizer(tiny.CHAT_TEMPLATE)))
    tokenizer = tiny.build_tokenizer()
    learnt = tokenizer.decode(part_of(sequence, "completion"), skip_special_tokens=True)
    assert learnt.strip() == completion
    assert prompt in tokenizer.decode(part_of(sequence, "prompt"))
    assert torch.equal(part_of(sequence, "all"), sequence.tokens)


def test_rows_that_repeat_are_one_example(tmp_path):
    rows = [{"text": text} for text in ("abc", "de", "abc", "abc", "f")]
    data = ScoredData(tiny.write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(data) == 3
    assert data.repeats == [3, 1, 1]
    assert data.numbers == [0, 1, 4]
    assert [(number, row["text"]) for number, row in data] == [(0, "abc"), (1, "de"), (4, "f")]


def test_a_pair_without_preference_has_no_completion(tmp_path):
    rows = [{"prompt": "1", "responses": ["a", "b"], "rewards": [1.0, 1.0]}]
    data = ScoredData(tiny.write_jsonl(tmp_path / "a.jsonl", rows))
    assert data.sequences(Encoder(tiny.build_tokenizer())) == [None]
    assert texts(data, "all") == [""]
    assert len(part_of(None, "all")) == 0


def test_a_row_that_cannot_be_encoded_is_named(tmp_path):
    data = ScoredData(tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}]))
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: no message of role 'assistant'"):
        data.sequences(Encoder(tiny.build_tokenizer(tiny.CHAT_TEMPLATE)))
    with pytest.raises(ValueError, match="part is 'half'"):
        texts(data, "half")


# --- what is finished ---------------------------------------------------------------------------------

JOB = {"by": "loss", "model": "m"}


def test_values_of_all_ranks_are_kept_and_others_are_nan(tmp_path):
    first, second = Finished(tmp_path / "p", JOB, 2), Finished(tmp_path / "p", JOB, 2, rank=1)
    first.add([4, 0], torch.tensor([[4.0, 40.0], [0.0, 1.0]]))
    second.add([2], torch.tensor([[2.0, 20.0]]))
    first.add([1], torch.tensor([[1.0, 10.0]]))
    # On a restart, with another number of ranks.
    again = Finished(tmp_path / "p", JOB, 2)
    assert again.places() == {0, 1, 2, 4}
    values = again.values(5)
    assert values[:3].tolist() == [[0.0, 1.0], [1.0, 10.0], [2.0, 20.0]]
    assert values[4].tolist() == [4.0, 40.0]
    assert all(map(math.isnan, values[3]))


@pytest.mark.parametrize("torn", [1, 11])
def test_a_record_torn_by_a_kill_does_not_count(tmp_path, torn):
    finished = Finished(tmp_path / "p", JOB, 1)
    finished.add([0, 1], torch.tensor([[5.0], [6.0]]))
    path = tmp_path / "p" / "rank0.records"
    path.write_bytes(path.read_bytes()[:-torn])
    again = Finished(tmp_path / "p", JOB, 1)
    assert again.places() == {0}
    again.add([1], torch.tensor([[7.0]]))
    assert again.values(2).tolist() == [[5.0], [7.0]]


def test_a_folder_of_another_job_is_refused(tmp_path):
    Finished(tmp_path / "p", JOB, 1)
    with pytest.raises(ValueError, match="was begun with model 'm', now it is 'n'"):
        Finished(tmp_path / "p", {**JOB, "model": "n"}, 1)
