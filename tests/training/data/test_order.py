"""The order of examples: permutations without lists, mixtures by weight, a function of the counter alone."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.training.data.order import Order, shuffled_index
from paligemma_jax.training.data.sources import read_spec


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_shuffle_shows_everything_once(size, key):
    assert sorted(shuffled_index(i, size, key) for i in range(size)) == list(range(size))


def test_shuffles_differ_by_key_and_from_the_order_of_the_file():
    orders = {tuple(shuffled_index(i, 50, key) for i in range(50)) for key in range(100)}
    assert len(orders) == 100 and tuple(range(50)) not in orders
    firsts = [shuffled_index(0, 4, key) for key in range(400)]
    assert all(60 < firsts.count(i) < 140 for i in range(4))


def test_a_shuffle_of_very_many_needs_no_list():
    assert 0 <= shuffled_index(10**15, 10**16, 3) < 10**16


def test_every_epoch_has_an_order_of_its_own():
    order = Order((7,), (Fraction(1),), seed=0)
    assert order.num_examples(3) == 21
    epochs = [tuple(order(counter)[1] for counter in range(7 * i, 7 * i + 7)) for i in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 3
    other = Order((7,), (Fraction(1),), seed=1)
    assert [order(i) for i in range(21)] != [other(i) for i in range(21)]


SOURCE = st.tuples(st.integers(1, 20), st.fractions(Fraction(1, 4), 4, max_denominator=6))  # size and weight


@settings(deadline=None, max_examples=60)
@given(st.lists(SOURCE, min_size=1, max_size=4), st.integers(0, 9))
def test_a_mixture_shows_each_source_as_often_as_it_weighs(sources, seed):
    """At any moment within one example for each source, and every source whole before it is shown again."""
    sizes, weights = zip(*sources, strict=True)
    order = Order(sizes, weights, seed)
    total = order.num_examples(2)
    shown = [order(counter) for counter in range(total)]
    whole = sum(weight * size for size, weight in sources)
    for number, (size, weight) in enumerate(sources):
        mine = [index for source, index in shown if source == number]
        assert abs(len(mine) - total * weight * size / whole) <= len(sources)
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size))


def test_sources_are_mixed_evenly():
    order = Order((30, 10), (Fraction(1), Fraction(1)), seed=0)
    second = [counter for counter in range(40) if order(counter)[0] == 1]
    assert {after - before for before, after in itertools.pairwise(second)} == {4}


def test_data_are_named_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = read_spec("a.jsonl ; 0.5 b.jsonl;1/3 my pictures")
    assert [(str(s.path), s.weight) for s in named] == [
        ("a.jsonl", 1),
        ("b.jsonl", Fraction(1, 2)),
        ("my pictures", Fraction(1, 3)),
    ]
    assert [(str(s.path), s.weight) for s in read_spec(["a", ("b", 0.25)])] == [("a", 1), ("b", Fraction(1, 4))]
    for name in ("2 cats", "a;b"):  # what is there is meant
        (tmp_path / name).mkdir()
        assert [(str(s.path), s.weight) for s in read_spec(name)] == [(name, 1)]
    for bad in ([("a", 0)], [("a", -1)], "0 b.jsonl"):
        with pytest.raises(ConfigError, match=r"weight .* is not possible: give a number above 0"):
            read_spec(bad)
    with pytest.raises(ConfigError, match="no data are named"):
        read_spec(" ; ")
