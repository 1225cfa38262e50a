import pytest

from aster.algo.schedule import learning_rate, warmup_length


def _rates(schedule, *, warmup=0, min_lr=0.0, total=5, lr=1.0):
    return [
        learning_rate(s, lr=lr, min_lr=min_lr, schedule=schedule, warmup=warmup, total_steps=total)
        for s in range(total)
    ]


def test_constant_is_the_papers_schedule():
    assert _rates("constant") == [1.0] * 5


def test_warm_up_moves_from_the_first_step_and_ends_at_the_full_rate():
    assert _rates("constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_with_the_floor_at_the_rate_is_constant_after_warm_up():
    # the reference's SFT: lr = min_lr = 3e-5, so the cosine vanishes
    assert _rates("cosine_with_min_lr", warmup=2, min_lr=1.0) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_cosine_by_hand():
    assert _rates("cosine_with_min_lr", min_lr=0.2, total=4) == pytest.approx([1.0, 0.882842712, 0.6, 0.317157288])


def test_decaying_schedules_stay_at_the_floor_past_the_end():
    for schedule in ("linear", "cosine_with_min_lr"):
        late = learning_rate(99, lr=1.0, min_lr=0.1, schedule=schedule, warmup=0, total_steps=5)
        assert late == pytest.approx(0.1)


def test_warm_up_steps_override_the_ratio():
    assert warmup_length(total_steps=188, warmup_ratio=0.06, warmup_steps=None) == 12
    assert warmup_length(total_steps=188, warmup_ratio=0.06, warmup_steps=3) == 3
    assert warmup_length(total_steps=188, warmup_ratio=0.0, warmup_steps=None) == 0
