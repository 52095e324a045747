"""Attention within documents against a written-out loop over positions, and what the positions say."""

import math
import pickle

import pytest
import torch

from rewarm.functional import document_attention as module
from rewarm.functional.document_attention import Documents, document_attention

ROWS = {
    "documents": [[0, 1, 2, 3, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4]],
    "branches": [[0, 1, 2, 3, 2, 3, 2], [0, 1, 2, 1, 2, 0, 1]],
    "plain": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]],
    "begins later": [[5, 6, 7, 8, 9, 10, 11], [3, 4, 0, 1, 2, 3, 1]],
}


def long(*lengths):
    """A row of documents, some of them longer than what is attended in one padded batch."""
    return [[place for length in lengths for place in range(length)]]


def states(rows, heads, key_heads, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shape = (len(rows), len(rows[0]), size)
    made = [torch.randn(shape[0], n, *shape[1:], generator=generator) for n in (heads, key_heads, key_heads)]
    return [values.to(device, dtype).requires_grad_() for values in made]


def attended(positions):
    """For each place of a row the places it attends to, told place by place."""
    seen, document, here = [], [], []
    for place, position in enumerate(positions):
        if place == 0 or position != positions[place - 1] + 1:
            if position == 0 or place == 0:
                document, prefix = [], []
            else:
                prefix = document[:position]
            begins_document, here = position == 0 or place == 0, []
        here.append(place)
        if begins_document:
            document.append(place)
        seen.append(prefix + here)
    return seen


def written_out(query, key, value, rows, scale):
    out = torch.zeros_like(query)
    for b, positions in enumerate(rows):
        for t, places in enumerate(attended(positions)):
            for head in range(query.shape[1]):
                other = head * key.shape[1] // query.shape[1]
                scores = torch.stack([query[b, head, t] @ key[b, other, s] for s in places]) * scale
                out[b, head, t] = scores.softmax(0) @ value[b, other, places]
    return out


def gradients(out, inputs):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("by_documents", [True, False], ids=["by documents", "masked"])
@pytest.mark.parametrize(("heads", "key_heads", "scale"), [(2, 2, None), (4, 2, 0.3)])
@pytest.mark.parametrize("rows", [*ROWS.values(), long(3, 70, 5, 1)], ids=[*ROWS, "long"])
def test_values_and_gradients_are_those_of_a_loop_over_positions(
    rows, heads, key_heads, scale, by_documents, monkeypatch
):
    if by_documents:
        monkeypatch.setattr(module, "_SHORT_ROW", 0)
    inputs = states(rows, heads, key_heads)
    ours = document_attention(*inputs, Documents(torch.tensor(rows)), scale)
    expected = written_out(*inputs, rows, 1 / math.sqrt(8) if scale is None else scale)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_long_branches_attend_as_what_they_would_be_alone():
    rows = [[*range(200), *range(150, 230), *range(90)]]
    inputs = states(rows, 2, 1)
    out = document_attention(*inputs, Documents(torch.tensor(rows)))
    alone = [torch.cat([values[:, :, :150], values[:, :, 200:280]], 2) for values in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, :, 200:280], expected[:, :, 150:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("length", "is_masked"), [(128, True), (129, False)])
def test_short_rows_alone_are_attended_to_under_a_mask(length, is_masked):
    documents = Documents(torch.arange(length).remainder(50).expand(2, -1))
    inputs = states([range(length)] * 2, 2, 1)
    document_attention(*inputs, documents)
    assert ("mask" in vars(documents)) == is_masked


def test_chosen_places_make_one_row_in_their_order():
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]])
    documents = Documents(rows, torch.tensor([4, 5, 6, 10, 11, 0, 1, 2, 3]))
    assert documents.shape == (1, 9)
    assert [tuple(run) for run in documents.runs] == [(0, 3, 0, 0), (3, 2, 0, 2), (5, 4, 2, 0)]
    assert documents.branched
    assert not documents.plain


def test_documents_survive_the_way_from_a_worker_process():
    documents = Documents(torch.tensor(ROWS["branches"]))
    inputs = states(ROWS["branches"], 2, 2)
    copied = pickle.loads(pickle.dumps(documents))
    assert torch.equal(document_attention(*inputs, documents), document_attention(*inputs, copied))


def test_what_the_kernel_is_told_are_the_places_that_each_run_attends_to():
    rows = ROWS["branches"]
    bounds = Documents(torch.tensor(rows)).bounds(torch.device("cpu"))
    expected = [[7 * row + s for s in seen] for row, places in enumerate(rows) for seen in attended(places)]
    ends = [int(end) - 1 for end in bounds.queries[1:]]
    runs = zip(bounds.keys[:-1].tolist(), bounds.keys[1:].tolist(), strict=True)
    assert [bounds.key_places[first:last].tolist() for first, last in runs] == [expected[e] for e in ends]
    assert (bounds.queries.dtype, bounds.keys.dtype) == (torch.int32, torch.int32)
    assert (bounds.most_queries, bounds.most_keys) == (4, 4)
    assert Documents(torch.tensor(ROWS["documents"])).bounds(torch.device("cpu")).key_places is None


def test_under_autocast_it_attends_in_its_dtype():
    rows = ROWS["branches"]
    query, key, value = states(rows, 2, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = document_attention(query, key, value.bfloat16(), Documents(torch.tensor(rows)))
    assert out.dtype == torch.bfloat16
    exact = document_attention(query, key, value, Documents(torch.tensor(rows)))
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("rows", [*ROWS.values(), long(3, 70, 5, 1)], ids=[*ROWS, "long"])
def test_the_kernel_is_as_near_to_float32_as_its_dtype_allows(rows, heads, key_heads):
    documents = Documents(torch.tensor(rows))
    inputs = states(rows, heads, key_heads, size=64, dtype=torch.bfloat16, device="cuda")
    exact = [values.detach().cpu().float().requires_grad_() for values in inputs]
    ours, expected = document_attention(*inputs, documents), document_attention(*exact, documents)
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    for one, other in zip(gradients(ours.float(), inputs), gradients(expected, exact), strict=True):
        assert (one.float().cpu() - other).norm() < 2e-2 * other.norm()


# --- errors ---------------------------------------------------------------------------------------------


def test_a_branch_cannot_share_more_than_there_is():
    message = "position_ids of row 1 go on from 4 at column 2, but the document before has only its first 2"
    with pytest.raises(ValueError, match=message):
        Documents(torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]]))
    with pytest.raises(
        ValueError, match="go on from 2 at column 3, but the document before has only its fir"
    ):
        Documents(torch.tensor([[7, 8, 9, 2]]))


def test_shapes_that_do_not_fit_are_errors():
    query, key, value = states(ROWS["plain"], 3, 2)
    documents = Documents(torch.tensor(ROWS["plain"]))
    with pytest.raises(ValueError, match="K a divisor of the 3 heads of query"):
        document_attention(query, key, value, documents)
    with pytest.raises(ValueError, match=r"documents are of rows \(2, 7\); query has \(1, 7\)"):
        document_attention(key[:1], key[:1], value[:1], documents)
