"""Standard errors and paired tests are those of SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.evaluation.statistics import paired_difference, standard_error


def test_the_difference_is_tested_question_by_question() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=200)
    values = first + generator.normal(0.1, 0.5, size=200)
    found = paired_difference(values, first)
    assert found.mean == pytest.approx((values - first).mean())
    assert found.stderr == pytest.approx(stats.sem(values - first))
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.mean) / found.stderr))
    # With this many questions, Student's t is nearly normal.
    assert found.p_value == pytest.approx(stats.ttest_rel(values, first).pvalue, abs=2e-3)


def test_equal_differences_are_certain() -> None:
    ones = np.ones(5)
    assert paired_difference(ones, ones).p_value == 1
    assert paired_difference(ones + 1, ones).p_value == 0


def test_one_value_has_no_standard_error() -> None:
    assert math.isnan(standard_error(np.ones(1)))
