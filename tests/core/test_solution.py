"""The ratios that certificates and reports quote: one rule for numbers and for tensors."""

from __future__ import annotations

import math

import pytest
import torch

from nmsolve.solution import relative_gap, retained_share

CASES = [(0.5, 2.0, 0.25), (0.0, 0.0, 0.0), (0.0, 3.0, 0.0), (1.0, 0.0, math.inf), (-1.0, 0.0, -math.inf)]


@pytest.mark.parametrize(("difference", "scale", "gap"), CASES)
def test_a_gap_is_the_same_of_numbers_and_tensors(difference, scale, gap):
    assert relative_gap(difference, scale) == gap
    tensors = (torch.tensor(value, dtype=torch.float64) for value in (difference, scale))
    assert relative_gap(*tensors).item() == gap


def test_what_overflowed_has_no_gap():
    assert math.isnan(relative_gap(math.inf - math.inf, math.inf))


def test_all_of_nothing_is_retained():
    assert (retained_share(0.0, 0.0), retained_share(1.0, 4.0)) == (1.0, 0.25)
