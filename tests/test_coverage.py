"Closed forms against listing, tallies against counting, plans against simulation."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from pose_nb.common import PoseError
from pose_nb.coverage import coverage, examples_needed, expected_pairs, never_seen, seen_after, tally_chunks, tally_positions
from pose_nb.coverage import position_coverage, tally_pairs
from pose_nb.even import CUTS, EvenPoSE
from pose_nb.exact import exact_coverage, exact_positions, pose_pairs, randpos_probability, three_chunk_probability
from pose_nb.positions import FIRST_CHUNK, Contiguous, FullLength, PoSE, RandPos, chunk_positions, example_rng
from pose_nb.samplers import CREAM, E2LLM, EarlyPoSE, LongRecipe

def histogram(p, target): return np.bincount((p[:, None] - p)[np.tril_indices(len(p), -1)], minlength=target)

@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(1, 15), st.sampled_from(sorted(FIRST_CHUNK)))
def test_closed_forms_equal_listing(window, M, rule):
    target, longest = window + M, FIRST_CHUNK[rule](window, 1)
    h = np.array([histogram(chunk_positions([l, window - l], [0, u]), target) for l in range(1, longest + 1) for u in range(M + 1)])
    p, pairs = exact_coverage(PoSE(window, target, first_chunk=rule))
    assert np.allclose(p, (h > 0).mean(0), atol=1e-12) and np.allclose(pairs, h.mean(0), atol=1e-10)

@settings(deadline=None, max_examples=80)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 6), st.integers(0, 1000))
def test_tallies_equal_counting(window, M, chunks, seed):
    target = window + M
    w = PoSE(window, target, min(chunks, window)).batch(np.full(7, window), example_rng(seed, 0, 0))
    h = np.array([histogram(p, target) for p in w.position_ids])
    for tally in (tally_chunks, tally_positions):
        seen, pairs = tally(w, target)
        assert np.allclose(seen, (h > 0).sum(0)) and np.allclose(pairs, h.sum(0))

@pytest.mark.parametrize('target', [5000, 16384, 131072])
def test_autocorrelation_is_exact_at_size(target):
    p = RandPos(1500, target)(1500, example_rng(0, 0, 0)).position_ids
    w = RandPos(1500, target).batch([1500], example_rng(0, 0, 0))
    assert (tally_positions(w, target)[1] == histogram(p, target)).all()

EXACT = [PoSE(20, 70), PoSE(20, 70, 3), PoSE(20, 70, 5), PoSE(20, 30, 3), RandPos(20, 70), EarlyPoSE(20, 70), CREAM(40, 160), CREAM(50, 100, 1., 'truncated', .3), E2LLM(20, 70), E2LLM(20, 70, 30, 6, 2)]
EXACT += [EvenPoSE(20, 70, c) for c in CUTS]

@pytest.mark.parametrize('s', EXACT, ids=repr)
def test_every_exact_law_agrees_with_draws(s):
    n = 6000
    w = s.batch(np.full(n, s.window), example_rng(5, 0, 0))
    (seen, pairs), (p, e) = (tally_pairs if isinstance(s, E2LLM) else tally_positions)(w, s.target), exact_coverage(s)
    if p is not None:
        assert np.abs(seen / n - p).max() < 5 * .5 / n**.5 and (seen[p == 0] == 0).all() and (seen[p == 1] == n).all()
        z = (seen / n - p)[(p > .02) & (p < .98)] / np.sqrt(p * (1 - p) / n)[(p > .02) & (p < .98)]
        assert np.sqrt((z**2).mean()) < 1.6                                    # neighbouring distances are correlated, so not exactly 1
    assert np.isclose(e[1:].sum(), s.window * (s.window - 1) / 2, rtol=1e-6) or isinstance(s, E2LLM)
    assert np.abs(pairs / n - e).max() < .06 * e.max()
    used = np.bincount(np.minimum(np.floor(w.position_ids + .5).astype(int), s.target - 1).ravel(), minlength=s.target) / n
    assert isinstance(s, E2LLM) or np.abs(used - exact_positions(s)).max() < 5 * .5 / n**.5
    assert np.isclose(position_coverage(s).probability.sum(), s.window, rtol=1e-6) or isinstance(s, E2LLM)

def test_positions_of_e2llm_by_listing():
    s, used = E2LLM(7, 20, 8, 4, 2), np.zeros(20)
    for g in range(1, 5):
        for t in range(g * 8 - 7 + 1):
            j = np.array([m + (t if m >= 2 else 0) for m in range(7)])
            used[np.unique(np.minimum((2 * j * 20 + g * 8) // (2 * g * 8), 19))] += 1 / 4 / (g * 8 - 6)
    assert np.allclose(exact_positions(s), used, atol=1e-12)

@pytest.mark.parametrize('window,target', [(3, 8), (4, 5), (5, 11), (7, 9)])
def test_randpos_by_exact_counting(window, target):
    import itertools
    every = [np.unique(np.diff(np.array(list(itertools.combinations(c, 2))), axis=1)) for c in itertools.combinations(range(target), window)]
    want = np.bincount(np.concatenate(every), minlength=target) / len(every)
    assert np.allclose(randpos_probability(window, target), want, atol=1e-10)

def test_randpos_at_size_by_whole_numbers():
    "The last distances of 2,048 of 16,384 positions: a sum over how many of the t possible pairs have one token, in whole numbers."
    from fractions import Fraction
    from math import comb
    W, T, p = 300, 3000, randpos_probability(300, 3000)
    for t in (1, 2, 10, 200):                                                   # t = T - r pairs at distance r, all disjoint
        ways = sum(comb(t, j) * 2**j * comb(T - 2 * t, W - j) for j in range(min(t, W) + 1))
        assert abs(p[T - t] - float(1 - Fraction(ways, comb(T, W)))) < 1e-11
    assert abs(p[1499] - p[1500]) < .01

@pytest.mark.parametrize('times', [1, 2, 7])
def test_times_is_a_binomial_tail(times):
    from scipy.stats import binom
    c = coverage(PoSE(16, 64))
    assert np.allclose(seen_after(c, 50, times)[1:], binom.sf(times - 1, 50, c.probability[1:]), atol=1e-12)
    k = examples_needed(c, .9, times=times)
    assert never_seen(c, k, times=times) <= .1 < never_seen(c, k - 1, times=times)

def test_even_skips_need_whole_blocks():
    c = coverage(EvenPoSE(16, 64))
    assert examples_needed(c) == c.block and examples_needed(c, times=3) == 3 * c.block and never_seen(c, c.block) == 0 < never_seen(c, c.block - 1)

def test_text_decides_where_longrecipe_skips():
    for f in (coverage, position_coverage):
        with pytest.raises(PoseError, match='depend on the text'): f(LongRecipe(20, 70, (1,)))

def test_golden_numbers():
    c, p = exact_coverage(PoSE(2048, 16384, first_chunk='code'))
    assert np.allclose(c[[2047, 14337, 16382, 16383]], [.1427774, .1427774, 1.395e-4, 6.975e-5], atol=5e-8)
    assert np.ptp(p[2047:14338]) < 1e-7 and p[14338] < p[14337]
    assert np.allclose(p[[1, 100, 1024, 2047, 15000, 16000]], [2046.0, 1853.17, 535.91, 48.7942, 36.75, 4.51], atol=6e-3) and np.isclose(p[16383], 6.975e-5, rtol=1e-3)

@pytest.mark.parametrize('s', [PoSE(20, 70), PoSE(20, 70, first_chunk='code'), PoSE(20, 70, 1), PoSE(20, 70, 3), PoSE(20, 70, 4), PoSE(20, 70, 20), Contiguous(20, 70), FullLength(20), RandPos(20, 70), RandPos(20, 20)])
def test_pairs_are_conserved_and_exact_agrees_with_counts(s):
    c, mc = coverage(s, 4000), coverage(s, 4000, seed=1, exact=False)
    assert np.isclose(c.pairs.sum(), s.window * (s.window - 1) / 2) and np.isclose(mc.pairs.sum(), c.pairs.sum())
    assert c.probability[0] == c.pairs[0] == 0 and c.probability.max() <= 1 and c.probability.shape == (s.target,)
    assert np.abs(c.probability - mc.probability).max() < .06 and np.abs(c.pairs - mc.pairs).max() < .5
    assert (expected_pairs(s, 4000) == c.pairs).all() and (c.examples == 0) == (c.exact and c.exact_pairs) and (c.exact or c.error.max() > 0)

@pytest.mark.parametrize('confidence', [.5, .9, .99, .999])
def test_examples_needed_is_the_smallest(confidence):
    c = coverage(PoSE(16, 64))
    k = examples_needed(c, confidence)
    assert never_seen(c, k) <= 1 - confidence < never_seen(c, k - 1)
    assert np.allclose(seen_after(c, 3), 1 - (1 - c.probability)**3)

def test_dense_positions_need_one_example():
    assert examples_needed(coverage(FullLength(50))) == 1 and examples_needed(coverage(Contiguous(20, 70)), upto=20) == 1

def test_requests_that_cannot_be_met():
    w = PoSE(20, 70).batch(np.full(9, 20), example_rng(0, 0, 0))
    for bad in (lambda: examples_needed(coverage(Contiguous(20, 70))), lambda: examples_needed(coverage(PoSE(20, 70)), 0.), lambda: coverage(PoSE(20, 70), 0),
                lambda: tally_chunks(w, 20), lambda: tally_positions(w, 20), lambda: pose_pairs(20, 20, 2), lambda: three_chunk_probability(2, 9)):
        with pytest.raises(PoseError): bad()

@pytest.mark.parametrize('s', [PoSE(20, 70), PoSE(20, 70, first_chunk='code'), PoSE(20, 70, 3), PoSE(20, 30, 3), RandPos(20, 70), EarlyPoSE(20, 70), E2LLM(20, 70), *(EvenPoSE(20, 70, c) for c in CUTS)], ids=repr)
def test_every_promised_distance_and_position_has_mass(s):
    p, pairs = exact_coverage(s)
    assert (p[1:] > 0).all() and (pairs[1:] > 0).all()
    if not isinstance(s, E2LLM): assert (exact_positions(s) > 0).all()

def test_cream_always_has_both_ends():
    p, used = exact_coverage(CREAM(40, 160))[0], exact_positions(CREAM(40, 160))
    assert p[159] == 1 and used[0] == used[159] == 1

def test_names_in_capitals_mean_the_same():
    a, b = CREAM(40, 160, gaussian='Truncated'), CREAM(40, 160, gaussian='truncated')
    assert (exact_coverage(a)[0] == exact_coverage(b)[0]).all() and (exact_positions(PoSE(8, 32, first_chunk='Code')) == exact_positions(PoSE(8, 32, first_chunk='code'))).all()
    assert (exact_coverage(EvenPoSE(8, 32, 'Half'))[0] == exact_coverage(EvenPoSE(8, 32, 'half'))[0]).all()
