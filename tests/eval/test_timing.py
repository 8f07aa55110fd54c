"""The paired timer on a clock that the test drives."""

from __future__ import annotations

import pytest

from diffusers_ext.eval import paired_ratio


class Machine:
    """Runs take a set time, multiplied by a load that changes from run to run."""

    def __init__(self, loads):
        self.now, self.loads, self.calls = 0.0, iter(loads), []

    def clock(self):
        return self.now

    def run(self, name, seconds):
        self.calls.append(name)
        self.now += seconds * next(self.loads)


def timed(loads, pairs, warmup=1):
    machine = Machine(loads)
    timing = paired_ratio(
        lambda: machine.run("a", 2.0), lambda: machine.run("b", 8.0), pairs, warmup=warmup, clock=machine.clock
    )
    return timing, machine.calls


def test_equal_load_gives_the_true_ratio():
    timing, calls = timed([1.0] * 8, pairs=3)
    assert (timing.ratio, timing.ratio_min, timing.ratio_max, timing.pairs) == (0.25, 0.25, 0.25, 3)
    assert calls == ["b", "a", "b", "a", "a", "b", "b", "a"], "warm-up, then pairs in alternating order"


def test_slow_drift_and_one_disturbed_pair_do_not_move_the_median():
    timing, _ = timed([1, 1, 2, 2, 4, 4, 4, 40], pairs=3)
    assert timing.ratio == 0.25 and timing.ratio_max == 2.5
    assert "0.250" in str(timing) and timing.to_dict()["pairs"] == 3


@pytest.mark.parametrize("bad", [{"pairs": 0}, {"warmup": -1}])
def test_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(lambda: None, lambda: None, **bad)
