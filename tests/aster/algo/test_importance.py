import numpy as np

from aster.algo.importance import stored_gap


def test_the_stored_gap_is_in_hundredths_and_ends_at_127_whatever_comes():
    old = np.array([-1.0, -2.0, -0.5, -9.0, -1.0, -np.inf])
    behaviour = np.array([-1.0, -1.5, -9.0, -0.5, np.nan, -1.0])
    gap = stored_gap(old, behaviour)
    assert gap.dtype == np.int8
    assert gap.tolist() == [0, -50, 127, -127, 127, -127]
