"""The layout of rows, checked against rules written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.prefix.layout import Layout, Segment


def test_siblings_start_at_the_same_depth_and_are_predicted_by_the_prompts_last_token():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = [[Segment([10, 11]), Segment([12])], [Segment([13]), Segment([14, 15])]]
    layout = Layout.build(mask, rows, pad_token_id=9)
    assert layout.input_ids.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert layout.path_position.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert layout.predicted_at.tolist() == [[3, 4, 3], [1, 1, 5]]


def test_rows_of_unequal_length_are_padded_and_padding_sees_only_the_prompt():
    mask = torch.tensor([[1, 1], [1, 0]])
    layout = Layout.build(mask, [[Segment([5])], [Segment([6, 7, 8])]], pad_token_id=9)
    assert layout.input_ids.tolist() == [[5, 9, 9], [6, 7, 8]]
    assert layout.segment.tolist() == [[0, -1, -1], [0, 0, 0]]
    assert layout.is_token.tolist() == [[True, False, False], [True, True, True]]
    assert layout.mask()[0, 0, 1].tolist() == [True, True, False, False, False]
    assert layout.mask()[1, 0, 1].tolist() == [True, False, True, True, False]


def test_a_row_may_have_fewer_segments_than_another_or_none():
    mask = torch.tensor([[1, 1], [1, 1]])
    layout = Layout.build(mask, [[], [Segment([6]), Segment([7])]], pad_token_id=0)
    assert layout.segment.tolist() == [[-1, -1], [0, 1]]
    assert layout.mask()[0, 0].tolist() == [[True, True, False, False]] * 2
    empty = Layout.build(mask, [[], []], pad_token_id=0)
    assert empty.mask().shape == (2, 1, 0, 2)


def test_a_child_of_an_empty_segment_continues_what_stands_above_it():
    mask = torch.tensor([[1, 1]])
    rows = [[Segment([]), Segment([5], parent=0), Segment([], parent=1), Segment([6], parent=2)]]
    layout = Layout.build(mask, rows, pad_token_id=0)
    assert layout.predicted_at.tolist() == [[1, 2]]
    assert layout.path_position.tolist() == [[0, 1]]
    assert layout.mask()[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_left_padded_and_empty_prompts_are_refused():
    for mask in ([[0, 1]], [[1, 0, 1]], [[0, 0]]):
        with pytest.raises(ValueError, match="right-padded"):
            Layout.build(torch.tensor(mask), [[Segment([1])]], pad_token_id=0)


def test_a_parent_must_come_before_its_child():
    for parent in (0, 1, -1):
        with pytest.raises(ValueError, match="parent"):
            Layout.build(torch.tensor([[1]]), [[Segment([1], parent=parent)]], pad_token_id=0)


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, list[Segment]]:
    parents = [draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None for i in range(draw(st.integers(1, 6)))]
    lengths = [draw(st.integers(0, 4)) for _ in parents]
    return draw(st.integers(1, 4)), [
        Segment(list(range(10 * i, 10 * i + n)), p) for i, (n, p) in enumerate(zip(lengths, parents, strict=True))
    ]


def path_of(row: list[Segment], index: int) -> list[int]:
    parent = row[index].parent
    return [*([] if parent is None else path_of(row, parent)), index]


@settings(max_examples=60)
@given(trees())
def test_what_a_token_sees_is_its_path_from_the_prompt_to_itself(tree: tuple[int, list[Segment]]):
    prompt, row = tree
    layout = Layout.build(torch.ones(1, prompt, dtype=torch.bool), [row], pad_token_id=0)
    mask = layout.mask()[0, 0]
    ids = torch.cat([torch.full((prompt,), -7), layout.input_ids[0]])
    at = 0
    for index, segment in enumerate(row):
        for offset, token in enumerate(segment.token_ids):
            before = [t for s in path_of(row, index)[:-1] for t in row[s].token_ids] + list(segment.token_ids[:offset])
            assert ids[mask[at]].tolist() == [-7] * prompt + before + [token]
            assert layout.path_position[0, at] == len(before)
            assert int(ids[layout.predicted_at[0, at]]) == (before[-1] if before else -7)
            at += 1
