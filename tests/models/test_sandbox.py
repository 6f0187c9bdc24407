"""Outputs are compared by their largest relative error."""

from __future__ import annotations

import math

import pytest
import torch

from flocking.models import relative_error


def test_what_is_not_finite_agrees_with_nothing() -> None:
    ones = torch.ones(3)
    assert relative_error(ones * torch.nan, ones) == math.inf
    assert relative_error(ones * torch.inf, ones) == math.inf
    mask = torch.tensor([0.0, -torch.inf])
    assert relative_error(mask, mask) == 0
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones * 1000.5, ones * 1000, ones * 999) == pytest.approx(0.5, rel=1e-2)
