"""How often ListOps has which length and value, against enumerated and drawn expressions."""

import itertools

import numpy as np
import pytest

from jaxlinear.data import tasks
from jaxlinear.data.tasks import list_ops, list_ops_odds


def test_operations_on_digits():
    expected = np.zeros((11, 10))
    for count in (2, 3, 4):
        for values in itertools.product(range(10), repeat=count):
            for operation in list_ops.OPERATIONS.values():
                expected[count + 2, operation(list(values))] += 1 / (3 * 4 * 10**count)
    np.testing.assert_allclose(list_ops_odds.odds(1, 4, 0.25, 10), expected, atol=1e-12)


def test_nested_operations():
    """Counts of values and lengths that occur often enough for a chi-squared test, and of no other length."""
    task = tasks.TASKS["listops"](length=10**4, shortest=0, depth=3, arguments=5)
    random, most = np.random.default_rng(0), 60
    counts, total = np.zeros((most + 1, 10)), 20_000
    for _ in range(total):
        expression = []
        value = task._write(random, expression, task.depth)
        if len(expression) <= most:
            counts[len(expression), value] += 1
    expected = total * list_ops_odds.odds(3, 5, 0.25, most)  # a fourth, as in the Long Range Arena
    often = expected > 5
    statistic = np.sum((counts[often] - expected[often]) ** 2 / expected[often])
    assert often.sum() > 150 and abs(statistic - often.sum()) < 4 * np.sqrt(2 * often.sum())
    assert not counts[expected < 1e-6].any()


@pytest.mark.parametrize("depth, arguments, most", [(1, 2, 3), (4, 5, 63), (10, 10, 300)])
def test_lengths_are_those_of_all_values(depth, arguments, most):
    odds = list_ops_odds.odds(depth, arguments, 0.25, most)
    np.testing.assert_allclose(list_ops_odds.lengths(depth, arguments, 0.25, most), odds.sum(axis=1), atol=1e-12)
    assert (odds >= 0).all() and odds.sum() < 1


def test_chance_is_the_share_of_the_likeliest_answer():
    task = tasks.TASKS["listops"](length=64, shortest=16, depth=4, arguments=5)
    found = [task.example(np.random.default_rng(i))[1][-1] - list_ops.DIGITS for i in range(3000)]
    assert max(np.bincount(found)) / 3000 == pytest.approx(task.chance, abs=0.015)
    assert task.chance == pytest.approx(0.1157, abs=1e-4)
