"""Names of genes are validated alike everywhere; correlations are NaN where they are not defined."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pixnet._correlation import pearson
from pixnet._names import check_genes


@pytest.mark.parametrize("container", [list, tuple, np.array, pd.Index, pd.Series, iter, dict.fromkeys])
def test_any_container_of_names(container):
    found = check_genes(container(["A", "B"]))
    assert found == ["A", "B"]
    assert {type(name) for name in found} == {str}


def test_one_name_is_a_list_of_one():
    assert check_genes("EPCAM") == ["EPCAM"]
    assert check_genes(np.str_("EPCAM")) == ["EPCAM"]
    assert check_genes("__total__", among=["A", "__total__"]) == ["__total__"]


@pytest.mark.parametrize(
    ("genes", "error", "message"),
    [
        (None, TypeError, "genes is None"),
        (3, TypeError, "genes is 3"),
        (b"EPCAM", TypeError, "genes is b'EPCAM'"),
        (["A", 3], TypeError, "genes holds 3"),
        ([], ValueError, "empty"),
        (["A", "B", "A"], ValueError, "more than once: A"),
        ("__total__", ValueError, "not a gene"),
        ("epcam", KeyError, "'epcam' is not in the map; did you mean 'EPCAM'. It has 'EPCAM', 'CD3E'"),
        (["Q1", "Q2", "CD3E"], KeyError, "'Q1' and 1 more are not in the map. It has"),
    ],
)
def test_refusals(genes, error, message):
    among = ["EPCAM", "CD3E"] if error is KeyError else None
    with pytest.raises(error, match=message):
        check_genes(genes, among=among, where="the map")


def test_pearson():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 4))
    b[:, 1] += a[:, 1]
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T)]
    np.testing.assert_allclose(pearson(a, b), expected)
    assert pearson(a[:, 0], b[:, 0]) == pytest.approx(expected[0])


def test_pearson_where_it_is_not_defined():
    a = np.arange(5.0)
    assert np.isnan(pearson(a, np.full(5, 0.1)))
    assert np.isnan(pearson(a[:1], a[:1]))
    assert np.isnan(pearson(np.empty((0, 3)), np.empty((0, 3)))).all()
    assert pearson(np.array([a, a]).T, np.array([a, a * 0]).T)[0] == pytest.approx(1)
