import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aster.algo.packing import denominators, pack, padding_row, unpack
from aster.types import Sample


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            ids=rng.integers(0, 1000, n).astype(np.int32),
            mask=rng.random(n) < 0.6,
            advantage=float(rng.normal()) if rng.random() < 0.7 else rng.normal(size=n).astype(np.float32),
            group=int(rng.integers(0, 5)),
            behaviour_logprobs=rng.normal(size=n).astype(np.float32),
            old_logprobs=None if rng.random() < 0.3 else rng.normal(size=n).astype(np.float32),
        )
        for n in lengths
    ]
    return samples, draw(st.integers(1, 80)), draw(st.integers(1, 5))


def test_the_worked_example_of_the_record():
    samples = [
        Sample(ids=np.array([5, 6, 7]), mask=np.array([False, True, True])),
        Sample(ids=np.array([8, 9]), mask=np.array([False, True])),
    ]
    [[row]] = pack(samples, row_tokens=5, dp_size=1)
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.labels.tolist() == [6, 7, 0, 9, 0]
    assert row.loss_mask.tolist() == [True, True, False, True, False]
    assert row.segment_ids.tolist() == [0, 0, 0, 1, 1]
    assert row.cu_seqlens.tolist() == [0, 3, 5]


@given(packings())
@settings(max_examples=60)
def test_every_token_sits_once_next_to_its_label(case):
    samples, row_tokens, dp_size = case
    seen = []
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=dp_size):
        for row in ranks:
            start = 0
            for segment, index in enumerate(row.sample_index):
                sample = samples[index]
                n = len(sample)
                part = slice(start, start + n)
                np.testing.assert_array_equal(row.input_ids[part], sample.ids)
                np.testing.assert_array_equal(row.labels[part], [*sample.ids[1:], 0])
                np.testing.assert_array_equal(row.loss_mask[part], [*sample.mask[1:], False])
                np.testing.assert_array_equal(row.position_ids[part], np.arange(n))
                np.testing.assert_array_equal(row.segment_ids[part], segment)
                if isinstance(sample.advantage, float):
                    np.testing.assert_array_equal(row.advantages[part], np.float32(sample.advantage))
                else:
                    np.testing.assert_array_equal(row.advantages[part], [*sample.advantage[1:], 0])
                np.testing.assert_array_equal(row.behaviour_logprobs[part], [*sample.behaviour_logprobs[1:], 0])
                if sample.old_logprobs is None:
                    assert np.isnan(row.old_logprobs[part][:-1]).all()
                else:
                    np.testing.assert_array_equal(row.old_logprobs[part], [*sample.old_logprobs[1:], 0])
                assert row.sample_group[segment] == sample.group
                start += n
                seen.append(index)
            assert start == len(row.input_ids) or row.sample_index == ()
    assert sorted(seen) == list(range(len(samples)))


@given(packings())
@settings(max_examples=60)
def test_rows_keep_the_budget_and_ranks_have_equal_counts(case):
    samples, row_tokens, dp_size = case
    micro = pack(samples, row_tokens=row_tokens, dp_size=dp_size)
    for ranks in micro:
        assert len(ranks) == dp_size
        for row in ranks:
            assert len(row.input_ids) <= row_tokens or len(row.sample_index) == 1
            if not row.sample_index:
                assert not row.loss_mask.any()
    assert any(row.sample_index for row in micro[-1]), "a whole micro-batch of padding is a wasted step"


@given(packings())
@settings(max_examples=60)
def test_facts_about_the_whole_list_are_the_same_in_every_row(case):
    samples, row_tokens, dp_size = case
    of_group = {g: sum(int(s.mask[1:].sum()) for s in samples if s.group == g) for g in {s.group for s in samples}}
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=dp_size):
        for row in ranks:
            assert row.num_sequences == sum(bool(s.mask[1:].any()) for s in samples)
            assert row.group_loss_tokens == tuple(of_group[g] for g in row.sample_group)
    assert denominators(samples) == (sum(of_group.values()), sum(v > 0 for v in of_group.values()))


@given(packings())
@settings(max_examples=60)
def test_unpack_brings_every_value_back_to_its_token(case):
    samples, row_tokens, dp_size = case
    micro = pack(samples, row_tokens=row_tokens, dp_size=dp_size)
    values = [[row.labels.astype(np.float32) for row in ranks] for ranks in micro]
    for sample, value in zip(samples, unpack(values, micro, [len(s) for s in samples]), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, [0, *sample.ids[1:]])


def test_packing_is_a_function_of_the_list():
    rng = np.random.default_rng(0)
    samples = [
        Sample(ids=np.zeros(int(n), np.int32), mask=np.ones(int(n), bool)) for n in rng.lognormal(4, 0.8, 300) + 1
    ]
    first, second = (pack(samples, row_tokens=700, dp_size=4) for _ in range(2))
    assert [[r.sample_index for r in m] for m in first] == [[r.sample_index for r in m] for m in second]


def test_lognormal_lengths_fill_rows_and_balance_ranks():
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(9.0, 0.6, 512).astype(int), 18_432)
    samples = [Sample(ids=np.zeros(n, np.int32), mask=np.ones(n, bool)) for n in lengths]
    micro = pack(samples, row_tokens=73_728, dp_size=8)
    rows = sum(len(m) for m in micro)
    assert rows == -(-int(lengths.sum()) // (73_728 * 8)) * 8  # not one row more than the tokens need
    for ranks in micro:
        sizes = [len(r.input_ids) for r in ranks]
        assert max(sizes) <= 1.02 * min(sizes)  # ranks wait for the longest row of each micro-batch


def test_best_fit_saves_the_case_that_the_even_spread_overflows():
    samples = [Sample(ids=np.zeros(n, np.int32), mask=np.ones(n, bool)) for n in (4, 4, 3, 3, 3, 3)]
    micro = pack(samples, row_tokens=10, dp_size=2)  # 10 = 4+3+3 twice; even spreading would need a third row
    assert len(micro) == 1
    assert [len(r.input_ids) for r in micro[0]] == [10, 10]


def test_a_single_sample_above_the_budget_gets_a_row_of_its_own():
    samples = [Sample(ids=np.zeros(n, np.int32), mask=np.ones(n, bool)) for n in (50, 3, 4)]
    rows = [r.sample_index for m in pack(samples, row_tokens=10, dp_size=1) for r in m]
    assert rows == [(0,), (1, 2)]


def test_fewer_samples_than_ranks_leaves_padding_rows():
    [ranks] = pack([Sample(ids=np.arange(3), mask=np.ones(3, bool))], row_tokens=8, dp_size=3)
    assert [r.sample_index for r in ranks] == [(0,), (), ()]
    assert ranks[1].cu_seqlens.tolist() == [0, 1]
    assert not padding_row().loss_mask.any()


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (Sample(ids=np.array([], np.int32), mask=np.array([], bool)), "no tokens"),
        (Sample(ids=np.arange(3), mask=np.ones(2, bool)), "mask has length 2"),
        (Sample(ids=np.arange(3), mask=np.ones(3, bool), old_logprobs=np.zeros(4)), "old_logprobs has length 4"),
    ],
)
def test_a_sample_that_cannot_be_packed_is_named(sample, words):
    with pytest.raises(ValueError, match=f"sample 1.*{words}"):
        pack([Sample(ids=np.arange(2), mask=np.ones(2, bool)), sample], row_tokens=8, dp_size=1)


def test_unpack_refuses_rows_that_are_missing():
    samples = [Sample(ids=np.arange(4), mask=np.ones(4, bool))] * 3
    micro = pack(samples, row_tokens=4, dp_size=1)
    with pytest.raises(ValueError, match="in none of the rows"):
        unpack([[np.zeros(4, np.float32)]], micro[:1], [4, 4, 4])
