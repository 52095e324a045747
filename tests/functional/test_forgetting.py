import math

import pytest

from rewarm.functional.forgetting import loss_history


def test_what_is_forgotten_is_the_rise_since_the_best():
    losses = [3.0, 2.5, 1.75, 1.75, 2.0, 2.25]
    for end in range(1, len(losses) + 1):
        history = loss_history(list(enumerate(losses[:end])))
        assert history.forgotten == losses[end - 1] - min(losses[:end])
        assert history.before == (0, 3.0)
        assert history.now == (end - 1, losses[end - 1])
    assert history.best == (2, 1.75)  # the first of two equals


def test_a_domain_that_only_improves_forgets_nothing():
    assert loss_history([("a", 2.0), ("b", 1.0)]).forgotten == 0.0


def test_a_loss_that_is_no_number_is_never_the_best():
    history = loss_history([(0, math.nan), (1, 2.0), (2, math.inf), (3, 3.0)])
    assert history.best == (1, 2.0)
    assert history.forgotten == 1.0
    assert math.isnan(loss_history([(0, 2.0), (1, math.nan)]).forgotten)


def test_without_a_loss_there_is_no_history():
    with pytest.raises(ValueError, match="points is empty"):
        loss_history([])
