"Four chunks: sums against listing, rules against sums, the curve against draws, and what `coverage` says about it."
import itertools

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

import pose_nb.coverage
from pose_nb.common import PoseError
from pose_nb.coverage import coverage, expected_pairs
from pose_nb.exact import bias_laws, exact_coverage, pose_pairs
from pose_nb.four import ORDERS, four_chunk_missing, four_chunk_probability, gauss_rule, order_bounds, piecewise, sum_points
from pose_nb.positions import PoSE, chunk_positions, example_rng

def listed(window, target):
    "P(distance), example by example."
    out, lower, M = np.zeros(target), np.tril_indices(window, -1), target - window
    for a, b, c in itertools.combinations(range(1, window), 3):
        for x, y, z in itertools.combinations_with_replacement(range(M + 1), 3):
            p = chunk_positions((a, b - a, c - b, window - c), (0, x, y, z))
            out += (np.bincount((p[:, None] - p)[lower], minlength=target) > 0) / ((window - 3) * (window - 2 - a) * (window - 1 - b) * (M + 1) * (M + 1 - x) * (M + 1 - y))
    return out

@pytest.mark.parametrize('window,target', [(4, 5), (4, 15), (5, 12), (6, 10), (7, 12), (8, 10), (9, 11)])
def test_every_term_equals_listing(window, target):
    want = listed(window, target)
    assert np.abs(four_chunk_probability(window, target, None)[0] - want).max() < 1e-12 and np.abs(exact_coverage(PoSE(window, target, 4))[0] - want).max() < 1e-12
    assert np.abs(four_chunk_probability(window, target, 10)[0] - want).max() < 1e-9                # no stretch is longer than the rules

@settings(deadline=None, max_examples=30)
@given(st.integers(4, 14), st.integers(1, 40), st.integers(0, 1000))
def test_a_missing_distance_is_in_one_order(window, M, seed):
    w = PoSE(window, window + M, 4)(window, example_rng(seed, 0, 0))
    edges, p = np.append(0, np.cumsum(w.lengths)), w.position_ids
    skips, have = p[edges[:-1]] - edges[:-1], set((p[:, None] - p).ravel().tolist())
    at = lambda form: form[0] + skips[form[1]]
    for r in range(1, window + M):
        hold = sum(w.lengths.max() <= r and all(at(low) <= skips[j] < at(high) for j, (low, high) in enumerate(order_bounds(f, edges, r, M), 1)) for f in ORDERS)
        assert hold == (r not in have)

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10), st.one_of(st.floats(1, 40), st.floats(40, 1e6)))
def test_rules_sum_polynomials(m, n):
    row, x, w = sum_points(np.array([float(int(n))]), m)
    n, degree = int(n), min(2 * m - 1, 9)
    numbers = np.arange(n) / n
    assert abs((w * (x / n)**degree).sum() / n - (numbers**degree).mean()) < 1e-9 and len(x) == min(m, n) and (w > 0).all()

def test_rules_by_table_are_the_rules():
    n = np.array([7.5, 33., 1e4])
    for k, (points, weights) in enumerate(zip(*gauss_rule(n, 6))):
        _, x, w = sum_points(n[[k]], 6)
        assert np.allclose(np.sort(x), points, rtol=1e-8) and np.allclose(w, weights, rtol=1e-8)

@pytest.mark.parametrize('r', [8, 12, 20, 40, 70, 99])
def test_rules_approach_the_full_sum(r):
    off = [abs(four_chunk_missing(r, 20, 100, m) - four_chunk_missing(r, 20, 100)) for m in (3, 6, 20)]
    assert off[2] < 1e-8 and off[1] < 5e-5 and (off[1] < off[0] or off[0] < 1e-6)

@pytest.mark.parametrize('r', [300, 445, 900, 2100, 3700, 3900])
def test_more_points_change_less(r):
    p = [four_chunk_missing(r, 512, 4096, m) for m in (4, 6, 8)]
    assert abs(p[1] - p[2]) < abs(p[0] - p[1]) < 2e-5

def test_known_places():
    W, T = 512, 8192
    P = lambda r: 1 - four_chunk_missing(r, W, T, 5)
    assert P(1) == P(W // 4 - 1) == 1 and P(W // 4 + 1) < 1
    assert abs(P(T - 1) - bias_laws(T - W, 4)[3][-1]) < 1e-10
    inside, end, bound = [P(r) for r in range(W // 4, W, 30)], [P(r) for r in range(T - 300, T, 30)], pose_pairs(W, T, 4)
    assert (np.diff(inside) < 0).all() and (np.diff(end) < 0).all()
    assert all(P(r) <= bound[r] + 1e-9 for r in (200, 511, 3000, 5000, T - 300, T - 2))

def test_draws_agree():
    n, rs = 60_000, [150, 256, 400, 511, 513, 1000, 1800, 2300, 3000, 3583, 3700, 3900, 4000, 4080]
    counted = coverage(PoSE(512, 4096, 4), n, seed=3, exact=False).probability[rs]
    p = np.array([1 - four_chunk_missing(r, 512, 4096, 5) for r in rs])
    assert (np.abs(counted - p) < 4.5 * np.sqrt(p * (1 - p) / n)).all()

def test_piecewise_takes_few_values():
    asked, kink = [], lambda r: abs(r - 3000) / 1e4 + np.log(r)
    def f(r): asked.append(r); return kink(r)
    out = piecewise(f, [1, 3000, 20_000], 1e-7)
    assert np.abs(out - kink(np.arange(1, 20_000))).max() < 2e-6 and len(asked) == len(set(asked)) < 400

def test_the_curve_is_as_good_as_it_says():
    p, error = four_chunk_probability(512, 4096, 4)
    rs = [130, 200, 300, 445, 480, 511, 700, 2300, 3640, 3800, 4050, 4095]
    assert max(abs(1 - p[r] - four_chunk_missing(r, 512, 4096, 7)) for r in rs) < error < 1e-3
    assert p[0] == 0 and p.shape == (4096,) and p[1:].min() > 0 and p.max() == 1

def test_coverage_says_what_it_is(monkeypatch):
    monkeypatch.setattr(pose_nb.coverage, 'four_chunk_probability', lambda window, target: (np.full(target, .5), 2e-6))
    c = coverage(PoSE(512, 4096, 4))
    assert not c.exact and c.exact_pairs and c.examples == 0 and c.within == 2e-6 and (c.error == 2e-6).all() and c.how == 'computed, to about 2e-06'
    small = coverage(PoSE(12, 40, 4))
    assert small.exact and small.within == 0 and small.how == 'exact'
    for s, kw in ((PoSE(511, 8192, 4), {}), (PoSE(512, 4095, 4), {}), (PoSE(512, 4096, 5), {}), (PoSE(512, 4096, 4), dict(exact=False)), (PoSE(12, 40, 4), dict(exact=False))):
        c = coverage(s, 50, **kw)
        assert not c.exact and c.within == 0 and c.examples == 50 and c.error.max() > 0 and c.how == 'estimated from 50 draws, seed 0'
    assert (expected_pairs(PoSE(512, 4096, 4)) == pose_pairs(512, 4096, 4)).all()

@pytest.mark.parametrize('sizes', [(3, 9), (9, 9), (9, 8), (512, 4096, 2), (512, 4096, 0)])
def test_refused(sizes):
    with pytest.raises(PoseError): four_chunk_probability(*sizes)
