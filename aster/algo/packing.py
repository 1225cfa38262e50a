"""Samples into packed rows, balanced over ranks and micro-batches, and values of rows back onto samples. Numpy only.

Shape legend: S tokens of a sample · R tokens of a row · D ranks · M micro-batches.

FSDP ranks meet at every layer, so a micro-batch takes as long as its longest row and every rank needs the same number
of them. `pack` therefore uses the fewest micro-batches that the budget allows, spreads tokens evenly over the M * D
rows (longest sample first, onto the emptiest row), and puts rows of like size into the same micro-batch. It is a
function of the samples alone: same list, same rows. `packed` makes one micro-batch after the other: a row weighs 45
bytes a token, several times what a step's trajectories weigh, so the driver never holds them all.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from aster.types import MicroBatch, TrainingSequence


def pack(samples: Sequence[TrainingSequence], *, row_tokens: int, dp_size: int) -> list[list[MicroBatch]]:
    """`[micro][rank]`: every sample in exactly one row, no row above `row_tokens` but for a longer single sample.

    Give the whole mini-batch at once: `group_loss_tokens` and `num_sequences` of the rows count over this list.
    Ranks that run out of samples get a row of padding. `sample_index` points into `samples`.

    >>> from aster.types import Sample
    >>> three = [Sample(ids=np.arange(n, dtype=np.int32), mask=np.ones(n, bool)) for n in (3, 5, 2)]
    >>> [[m.sample_index for m in ranks] for ranks in pack(three, row_tokens=6, dp_size=2)]
    [[(0, 2), (1,)]]
    """
    return list(packed(samples, row_tokens=row_tokens, dp_size=dp_size))


def packed(samples: Sequence[TrainingSequence], *, row_tokens: int, dp_size: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches of `pack`, each `[rank]`, made when it is asked for. Checks the samples at once."""
    if row_tokens < 1 or dp_size < 1:
        raise ValueError(f"row_tokens={row_tokens} and dp_size={dp_size} must be at least 1")
    lengths = [len(s) for s in samples]
    for index, sample in enumerate(samples):
        _check(index, sample)
    rows = _assign(lengths, row_tokens=row_tokens, dp_size=dp_size)
    rows.sort(key=lambda row: (-sum(lengths[i] for i in row), row))  # like sizes meet in one micro-batch
    loss_tokens = [s.loss_tokens for s in samples]
    group_tokens: Counter[int] = Counter()
    for sample, tokens in zip(samples, loss_tokens, strict=True):
        group_tokens[sample.group] += tokens
    num_sequences = sum(tokens > 0 for tokens in loss_tokens)

    def build() -> Iterator[list[MicroBatch]]:
        for start in range(0, len(rows), dp_size):
            yield [
                _row([samples[i] for i in row], row, group_tokens=group_tokens, num_sequences=num_sequences)
                for row in rows[start : start + dp_size]
            ]

    return build()


def unpack(
    values: Sequence[Sequence[np.ndarray]], microbatches: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]
) -> list[np.ndarray]:
    """Values of rows ([micro][rank] of [R], label-aligned) back to samples: [S] each, aligned with its ids.

    The first token of a sample is nobody's label, so its value is 0. `lengths` are those of the packed list.

    >>> from aster.types import Sample
    >>> pair = [Sample(ids=np.array(ids), mask=np.ones(len(ids), bool)) for ids in ([5, 6, 7], [8, 9])]
    >>> rows = pack(pair, row_tokens=5, dp_size=1)
    >>> [v.tolist() for v in unpack([[np.array([0.6, 0.7, 9.9, 0.9, 9.9])]], rows, [3, 2])]
    [[0.0, 0.6, 0.7], [0.0, 0.9]]
    """
    out: list[np.ndarray | None] = [None] * len(lengths)
    for value_row, micro_row in zip(values, microbatches, strict=True):
        for value, micro in zip(value_row, micro_row, strict=True):
            for index, own in unpack_row(value, micro, lengths):
                out[index] = own
    missing = [i for i, v in enumerate(out) if v is None]
    if missing:
        raise ValueError(f"samples {missing[:5]} are in none of the rows: unpack() needs every row that pack() made")
    return [v for v in out if v is not None]


def unpack_row(value: np.ndarray, micro: MicroBatch, lengths: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index of a sample, its [S] values) for every sample of one row; as `unpack`."""
    if value.shape != micro.labels.shape:
        raise ValueError(f"values of shape {value.shape} do not belong to a row of {len(micro.labels)} tokens")
    start = 0
    for index in micro.sample_index:
        stop = start + lengths[index]
        yield index, np.concatenate([np.zeros(1, value.dtype), value[start : stop - 1]])
        start = stop


def denominators(samples: Sequence[TrainingSequence]) -> tuple[int, int]:
    """(loss tokens, groups with a loss token) of a mini-batch, as `forward_backward` wants them."""
    counts = [s.loss_tokens for s in samples]
    return sum(counts), len({s.group for s, tokens in zip(samples, counts, strict=True) if tokens})


def padding_row(*, num_sequences: int = 0) -> MicroBatch:
    """One token without loss, for a rank that has nothing to do but must take part in the collectives."""
    return MicroBatch(
        input_ids=np.zeros(1, np.int64),
        position_ids=np.zeros(1, np.int64),
        labels=np.zeros(1, np.int64),
        loss_mask=np.zeros(1, bool),
        advantages=np.zeros(1, np.float32),
        behaviour_logprobs=np.zeros(1, np.float32),
        old_logprobs=np.zeros(1, np.float32),
        reference_logprobs=np.zeros(1, np.float32),
        segment_ids=np.zeros(1, np.int32),
        sample_index=(),
        sample_group=(),
        num_sequences=num_sequences,
    )


def _check(index: int, sample: TrainingSequence) -> None:
    length = len(sample)
    if length == 0:
        raise ValueError(f"sample {index} has no tokens: drop it before packing")
    for name, found in sample.lengths().items():
        if found != length:
            raise ValueError(f"sample {index}: {name} has length {found}, its ids have {length}")


def _assign(lengths: Sequence[int], *, row_tokens: int, dp_size: int) -> list[list[int]]:
    """Which samples share a row: the fewest rows (a multiple of `dp_size`) that hold them, as even as they go.

    Longest-first onto the emptiest row is the most even; where it overflows, best fit is tried with the same count.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alone = [[i] for i in order if lengths[i] >= row_tokens]  # a full row, or over budget: nothing joins it
    order = order[len(alone) :]
    total = sum(lengths[i] for i in order)
    at_least = len(alone) + -(-total // row_tokens)
    count = max(dp_size, -(-at_least // dp_size) * dp_size)
    while True:
        free = count - len(alone)
        rows = _emptiest_first(lengths, order, rows=free, row_tokens=row_tokens)
        if rows is None:
            rows = _best_fit(lengths, order, rows=free, row_tokens=row_tokens)
        if rows is not None:
            return [sorted(row) for row in alone + rows]
        count += dp_size


def _emptiest_first(
    lengths: Sequence[int], order: Sequence[int], *, rows: int, row_tokens: int
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, r) for r in range(rows)]
    for i in order:
        if not heap or heap[0][0] + lengths[i] > row_tokens:
            return None
        load, r = heap[0]
        bins[r].append(i)
        heapq.heapreplace(heap, (load + lengths[i], r))
    return bins


def _best_fit(lengths: Sequence[int], order: Sequence[int], *, rows: int, row_tokens: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(rows)]
    room = [(row_tokens, r) for r in range(rows)]  # ascending by what is left
    for i in order:
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            return None
        left, r = room.pop(at)
        bins[r].append(i)
        bisect.insort(room, (left - lengths[i], r))
    return bins


def _row(
    samples: Sequence[TrainingSequence], index: Sequence[int], *, group_tokens: Counter[int], num_sequences: int
) -> MicroBatch:
    if not samples:
        return padding_row(num_sequences=num_sequences)
    lengths = [len(s) for s in samples]
    total = sum(lengths)
    row = {
        name: np.empty(total, dtype)
        for name, dtype in (
            ("input_ids", np.int64), ("position_ids", np.int64), ("labels", np.int64), ("loss_mask", bool),
            ("advantages", np.float32), ("behaviour_logprobs", np.float32), ("old_logprobs", np.float32),
            ("reference_logprobs", np.float32),
        )
    }  # fmt: skip
    start = 0
    for sample, length in zip(samples, lengths, strict=True):
        stop = start + length
        ids = sample.ids  # a `TrajectorySample` puts its arrays together each time
        row["input_ids"][start:stop] = ids
        row["position_ids"][start:stop] = np.arange(length)
        for name, values, last in (
            ("labels", ids, 0),
            ("loss_mask", sample.mask, False),
            ("advantages", sample.advantage, 0),
            ("behaviour_logprobs", sample.behaviour_logprobs, 0),
            ("old_logprobs", sample.old_logprobs, 0),
            ("reference_logprobs", sample.reference_logprobs, 0),
        ):
            if isinstance(values, np.ndarray):  # one to the left: label alignment
                row[name][start : stop - 1] = values[1:]
                row[name][stop - 1] = last
            else:  # Absent log-probs are NaN, so that a loss that needs them fails instead of training on zeros.
                row[name][start:stop] = np.nan if values is None else values
                if values is None:
                    row[name][stop - 1] = last
        start = stop
    return MicroBatch(
        **row,
        segment_ids=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
        sample_index=tuple(index),
        sample_group=tuple(s.group for s in samples),
        group_loss_tokens=tuple(group_tokens[s.group] for s in samples),
        num_sequences=num_sequences,
    )
