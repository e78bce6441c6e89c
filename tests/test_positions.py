"Properties of every sampler, and the bounds that a page cannot show well."
import itertools, pickle
from collections import Counter

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from pose_nb.common import PoseError
from pose_nb.positions import CONTENT, FIRST_CHUNK, Contiguous, FullLength, PoSE, RandPos, chunk_lengths, chunk_positions, example_rng, rising_biases
from pose_nb.even import CUTS, EvenPoSE, block_draws
from pose_nb.positions import ExampleDraws
from pose_nb.samplers import CREAM, E2LLM, GAUSSIAN, SAMPLERS, EarlyPoSE, LongRecipe, Segments, Turns, composition, e2_positions, get_sampler

sizes = st.integers(1, 40)

@st.composite
def samplers(draw):
    name, window = draw(st.sampled_from(sorted(SAMPLERS))), draw(sizes)
    if name == 'full': return FullLength(window)
    if name == 'cream':
        f = draw(st.integers(2, 6))
        window = draw(st.integers(8 * f + 1, 150))
        return CREAM(window, f * window, draw(st.sampled_from((.5, 3., 10.))), draw(st.sampled_from(sorted(GAUSSIAN))), draw(st.sampled_from((0., .5, 1.))))
    target = window + draw(st.integers(name.startswith('pose') or name in ('longrecipe', 'turns'), 60))
    if name in ('pose_early', 'pose_even', 'longrecipe', 'turns'): window, target = max(window, 2), max(window, 2) + target - window
    if name == 'pose_even': return EvenPoSE(window, target, draw(st.sampled_from(sorted(CUTS))), draw(st.sampled_from(sorted(CONTENT))))
    if name == 'longrecipe': return LongRecipe(window, target, (1, 2), draw(st.sampled_from((0., .5, 1.))), (3,))
    if name == 'turns': return Turns(window, target, (1, 2))
    if name == 'e2llm':
        sinks = draw(st.integers(0, min(6, window - 1)))
        return E2LLM(window, target + draw(st.integers(1, 9)), min(target, window + draw(st.integers(0, 5))), draw(st.integers(1, 9)), sinks)
    if name != 'pose': return get_sampler(name, window, target)
    first = draw(st.sampled_from(sorted(FIRST_CHUNK)))
    chunks = draw(st.integers(1, min(window, 2 if first == 'code' else 6)))
    return PoSE(window, target, chunks, draw(st.sampled_from(sorted(CONTENT))), first)

def extras(s, lens, seed=0):
    "What a sampler wants besides lengths and randomness; every text has a split token (1 or 2) near its start."
    texts = [np.random.default_rng(i).integers(0, 9, n) for i, n in enumerate(lens)]
    for t in texts: t[1 % len(t)] = 1 + (len(t) > 1 and t[0] == 1); t[0] = 0
    return {k: v for k, v in dict(tokens=texts, place=(seed, np.arange(len(lens)))).items() if k in s.wants}

@settings(deadline=None, max_examples=400)
@given(samplers(), st.integers(0, 50), st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_every_window_is_lawful(s, extra, n, seed):
    lens = s.min_doc_len + (isinstance(s, Segments) and s.after) + np.arange(n) * extra
    given_ = extras(s, lens)
    w = s.batch(lens, example_rng(seed, 0, 0), **given_)
    for a in (w.input_index, w.position_ids, w.chunk_id): assert a.shape == (n, s.window) and a.dtype == (np.float64 if isinstance(s, E2LLM) and a is w.position_ids else np.int64) and a.flags.writeable
    assert (w.lengths.sum(1) == s.window).all() and (np.diff((w.lengths > 0).astype(int), axis=1) <= 0).all()
    assert (np.diff(w.position_ids) > 0).all() and (np.diff(w.input_index) > 0).all() and (np.diff(w.chunk_id) >= 0).all()
    assert w.position_ids.min() >= 0 and w.position_ids.max() < s.target
    assert w.input_index.min() >= 0 and (w.input_index.max(1) < lens).all()
    inside = np.diff(w.chunk_id) == 0
    if not isinstance(s, E2LLM): assert (np.diff(w.position_ids)[inside] == 1).all()
    if not (isinstance(s, LongRecipe) and s.drop): assert (np.diff(w.input_index)[inside] == 1).all()
    if isinstance(s, Segments): assert w.lengths.shape[1] > 1
    if isinstance(s, CREAM): assert (w.position_ids[:, 0] == 0).all() and (w.position_ids[:, -1] == s.target - 1).all() and (w.input_index[:, -1] == lens - 1).all()
    if isinstance(s, PoSE):
        assert (w.position_ids[:, 0] == 0).all() and (w.chunk_id[:, -1] == s.chunks - 1).all()
        if s.content == 'aligned': assert (w.input_index == w.position_ids).all()
        if s.content == 'contiguous': assert not w.seams.any()
    one = s(int(lens[0]), example_rng(seed, 1, 2), tokens=given_['tokens'][0] if 'tokens' in given_ else None, place=(0, 0))
    assert (one.position_ids == s.batch(lens[:1], example_rng(seed, 1, 2), **extras(s, lens[:1])).position_ids[0]).all() and one.position_ids.shape == (s.window,)

@settings(deadline=None, max_examples=150)
@given(samplers(), st.integers(1, 7), st.integers(0, 7), st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_examples_do_not_depend_on_the_batch(s, n, cut, epoch, seed, start):
    lens = s.min_doc_len + 1 + np.arange(n) * 3
    tokens, cut = extras(s, lens).get('tokens'), min(cut, n)
    part = lambda a, b: s.examples(lens[a:b], seed, epoch, start + a, tokens and tokens[a:b])
    whole, left, right = part(0, n), part(0, cut), part(cut, n)
    assert (whole.position_ids == np.concatenate([left.position_ids, right.position_ids])).all()
    assert (whole.input_index == np.concatenate([left.input_index, right.input_index])).all()
    assert (whole.lengths.sum(1) == s.window).all()

def test_example_draws_are_uniform_and_of_their_own():
    d = ExampleDraws(1, 2, 3, 50_000)
    a, b, k, z = d.random(), d.random(), d.integers(5, 8, endpoint=True), d.normal(2., .5)
    assert abs(a.mean() - .5) < .01 and abs(a.var() - 1 / 12) < .002 and abs(np.corrcoef(a, b)[0, 1]) < .02
    assert set(k.tolist()) == {5, 6, 7, 8} and np.ptp(np.bincount(k)[5:]) < 600 and abs(z.mean() - 2) < .02 and abs(z.std() - .5) < .01
    assert not np.isin(example_rng(1, 2, 0).random(1000), a).any()
    rows = ExampleDraws(1, 2, 10, 6).random((6, 5))
    assert (rows[2:] == ExampleDraws(1, 2, 12, 4).random((4, 5))).all() and (ExampleDraws(0, 0, 0, 3).integers(np.array([0, 5, 9]), np.array([0, 5, 9]), endpoint=True) == [0, 5, 9]).all()

@settings(deadline=None, max_examples=60)
@given(st.integers(2, 30), st.integers(1, 100), st.sampled_from(sorted(CUTS)), st.integers(0, 2**40), st.integers(0, 50))
def test_every_block_has_every_distance(window, more, cut, seed, block):
    s = EvenPoSE(window, window + more, cut)
    p = s.examples([window] * s.block, seed, start=block * s.block).position_ids
    i, j = np.tril_indices(window, -1)
    assert set(range(1, s.target)) <= set((p[:, i] - p[:, j]).ravel().tolist())
    assert s.block <= -(-more // (window - 1)) + 2                       # the bound of the page, and at most two more

def test_even_skips_are_uniform_on_their_line():
    first, skip = block_draws(9, 40, 'paper', 3, np.arange(40_000))
    k, low = -(-(40 - 2 + 4) // 8), 1 - 9 // 2 - (-(-(40 - 2 + 4) // 8) * 8 - (40 - 2 + 4)) // 2
    want = np.bincount(np.clip(np.arange(low, low + 8 * k), 0, 31), minlength=32) / (8 * k)
    assert np.abs(np.bincount(skip, minlength=32) / 40_000 - want).max() < .01 and np.abs(np.bincount(first, minlength=9)[1:] / 40_000 - 1 / 8).max() < .01

@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 999))
def test_composition(segments, spare, seed):
    s = composition(segments, spare, example_rng(seed, 0, 0))
    assert s[0] == 0 and (np.diff(s) >= 0).all() and s[-1] <= spare and len(s) == segments

def test_e2_positions_of_the_paper():
    assert (e2_positions(12, [4, 1], [100, 0])[:, [2, 3, 4, 10]] == [[.5, .75, 26, 27.5], [2, 3, 4, 10]]).all()

def test_dropping_sentences_keeps_the_rich_ones_and_a_window():
    text = np.array(([5] * 4 + [1] + [3] * 4 + [1]) * 40)
    w = LongRecipe(100, 400, (1,), 1., (3,))(len(text), example_rng(0, 0, 0), text)
    kept = text[w.input_index]
    assert (kept == 3).sum() == 80 and (kept == 5).sum() == 0 and len(kept) == 100
    short = text[:110]
    assert len(LongRecipe(100, 400, (1,), 1., (3,))(110, example_rng(0, 0, 0), short).input_index) == 100

@given(samplers())
def test_short_documents_are_refused_with_both_numbers(s):
    with pytest.raises(PoseError, match=f'{s.min_doc_len - 1} tokens.*at least {s.min_doc_len}'): s(s.min_doc_len - 1, example_rng(0, 0, 0), np.zeros(s.min_doc_len - 1, int), (0, 0))

class Extreme:
    "A generator that always returns the largest (or smallest) allowed value."
    def __init__(self, top): self.top = top
    def integers(self, low, high, size=None, endpoint=False):
        v = np.asarray(high if self.top else low)
        return np.broadcast_to(v - (self.top and not endpoint), size if size is not None else np.broadcast_shapes(np.shape(low), np.shape(high)))

@pytest.mark.parametrize('chunks,first', [(2, 'paper'), (2, 'code'), (3, 'paper'), (5, 'paper')])
def test_both_ends_are_reachable(chunks, first):
    s = PoSE(64, 512, chunks, first_chunk=first)
    w = s(300, Extreme(True))
    assert w.position_ids[-1] == 511 and w.input_index[-1] == 299
    w = s(300, Extreme(False))
    assert (w.position_ids == np.arange(64)).all() and (w.input_index == np.arange(64)).all() and (w.chunk_id[:chunks] == np.arange(chunks)).all()

@pytest.mark.parametrize('first', ['paper', 'code'])
def test_small_case_is_uniform(first):
    n, s = 60_000, PoSE(4, 7, first_chunk=first)
    cuts = range(1, 4 if first == 'paper' else 3)
    w = s.batch(np.full(n, 4), example_rng(3, 0, 0))
    got = Counter(zip((w.chunk_id == 0).sum(1).tolist(), (w.position_ids[:, -1] - 3).tolist()))
    assert set(got) == set(itertools.product(cuts, range(4)))
    p = 1 / len(got)
    assert max(abs(c - n * p) for c in got.values()) < 5 * np.sqrt(n * p * (1 - p))

def test_randpos_subsets_are_uniform():
    p = RandPos(3, 6).batch(np.full(40_000, 3), example_rng(4, 0, 0)).position_ids
    got = Counter(map(tuple, p.tolist()))
    assert set(got) == set(itertools.combinations(range(6), 3))
    assert max(abs(c - 2000) for c in got.values()) < 5 * np.sqrt(2000)
    assert (RandPos(9, 9)(9, example_rng(0, 0, 0)).position_ids == np.arange(9)).all()

def test_randpos_blocks_join():
    s = RandPos(3, 2**21)                                       # two rows a block
    p = s.batch(np.full(5, 3), example_rng(5, 0, 0)).position_ids
    assert len(np.unique(p)) == 15 and (np.diff(p) > 0).all() and p.max() < 2**21

@pytest.mark.parametrize('lens,lo', [((100, 200, 5000), 0), ((100, 100), 0)])
def test_offsets_use_each_documents_own_length(lens, lo):
    w = PoSE(64, 512).batch(np.repeat(lens, 4000), example_rng(6, 0, 0))
    top = w.input_index.max(1).reshape(len(lens), -1).max(1)
    assert (top < lens).all() and (top > np.array(lens) * .98).all()

def test_mean_skip_is_half_the_range():
    u = rising_biases(14336, 4, 100_000, example_rng(7, 0, 0)).mean(0) / 14336
    assert np.allclose(u, [0, .5, .75, .875], atol=.005)

@given(st.integers(1, 60), st.data())
def test_chunk_lengths(window, data):
    chunks = data.draw(st.integers(1, window))
    l = chunk_lengths(window, chunks, 20, example_rng(8, 0, window))
    assert l.shape == (20, chunks) and l.min() >= 1 and (l.sum(1) == window).all()

def test_many_chunks_as_many_as_tokens():
    w = PoSE(16, 64, 16)(16, example_rng(9, 0, 0))
    assert (w.chunk_id == np.arange(16)).all()

@given(*[st.integers(0, 2**64 - 1)] * 3)
def test_example_rng_is_a_function_of_its_address(seed, epoch, index):
    a, b = (example_rng(seed, epoch, index).integers(0, 2**62, 8) for _ in range(2))
    assert (a == b).all()

def test_neighbouring_addresses_differ():
    draws = {example_rng(*k).integers(0, 2**62).item() for k in itertools.product(range(6), repeat=3)}
    assert len(draws) == 216

def test_addresses_look_independent():
    x = np.array([example_rng(0, 0, i).random() for i in range(20_000)])
    assert abs(x.mean() - .5) < .01 and abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < .03

def test_samplers_are_values_and_travel():
    for s in (PoSE(8, 20, 3), Contiguous(8, 20), FullLength(20), RandPos(8, 20)):
        assert pickle.loads(pickle.dumps(s)) == s and hash(s) is not None and s.batch([], example_rng(0, 0, 0)).position_ids.shape == (0, s.window)

@pytest.mark.parametrize('bad', [
    lambda: PoSE(8, 8), lambda: PoSE(8, 20, 0), lambda: PoSE(8, 20, 9), lambda: PoSE(8, 20, 2.), lambda: PoSE(0, 5), lambda: PoSE(8, 20, 3, first_chunk='code'),
    lambda: PoSE(8, 20, content='x'), lambda: PoSE(8, 20, first_chunk='x'), lambda: Contiguous(8, 7), lambda: FullLength(0), lambda: RandPos(8, 7), lambda: RandPos(8, 20.),
    lambda: get_sampler('x', 8, 20), lambda: get_sampler('pose', 8, 20, chunk=2), lambda: get_sampler('full', 8, 20, chunks=2), lambda: example_rng(0, -1, 0),
    lambda: example_rng(2**64, 0, 0), lambda: example_rng(.5, 0, 0), lambda: chunk_positions([1, 2], [3, 2]), lambda: chunk_positions([0, 2], [0, 2]), lambda: chunk_positions([[1, 2], [1, 3]], [[0, 1], [0, 1]]),
    lambda: EvenPoSE(8, 20, cut='x'), lambda: EvenPoSE(1, 9), lambda: E2LLM(8, 8), lambda: E2LLM(8, 20, original=7), lambda: E2LLM(8, 20, max_scale=0), lambda: E2LLM(8, 20, sinks=-1), lambda: E2LLM(8, 20, sinks=8), lambda: E2LLM(8, 20, max_scale=2000), lambda: CREAM(64, 192, sigma=float('inf')), lambda: LongRecipe(8, 20, (1,), .5, (1.7,)), lambda: PoSE(8, 20).examples([9], -1), lambda: Turns(4, 20, (1,)).batch([6, 6], example_rng(0, 0, 0), [np.ones(6, int)]),
    lambda: Turns(8, 20), lambda: Turns(8, 20, (1.5,)), lambda: Turns(8, 8, (1,)), lambda: LongRecipe(8, 20, (1,), drop=2.), lambda: Turns(4, 20, (1,))(6, example_rng(0, 0, 0)),
    lambda: Turns(4, 20, (1,))(6, example_rng(0, 0, 0), np.zeros(6, int)), lambda: Turns(4, 20, (1,))(6, example_rng(0, 0, 0), np.array([1, 0, 0, 0, 0, 0])),
    lambda: CREAM(64, 512, sigma=-1.), lambda: CREAM(64, 512), lambda: chunk_positions([1, 2], [0]), lambda: rising_biases(-1, 2, 3, example_rng(0, 0, 0)), lambda: rising_biases(np.array([3, -1]), 2, 2, example_rng(0, 0, 0))])
def test_bad_requests(bad):
    with pytest.raises(PoseError): bad()

@pytest.mark.parametrize('window,target,golden', [(3, 6, {0: .75, 1: 2.5, 2: 4.25}), (2048, 16384, {0: 6.9966, 1: 14.9932, 1024: 8195.498, 2047: 16376.003})])
def test_randpos_means_are_those_of_order_statistics(window, target, golden):
    p = RandPos(window, target).batch(np.full(256, window), example_rng(0, 0, 12)).position_ids
    for k, mean in golden.items():
        assert abs((k + 1) * (target + 1) / (window + 1) - 1 - mean) < 1e-3
        assert abs(p[:, k].mean() - mean) < 4 * p[:, k].std() / 16


def test_impactful_tokens_are_those_that_become_likelier():
    import torch
    from types import SimpleNamespace
    from pose_nb.samplers import impactful_tokens
    ids = torch.tensor([[0, 1, 2, 3, 1, 4, 1, 2]])
    flat, liked = torch.zeros(1, 8, 5), torch.zeros(1, 8, 5)
    liked[..., 1] = 3.; liked[..., 3] = 1.
    model = lambda logits: lambda input_ids: SimpleNamespace(logits=logits + 7.)
    assert impactful_tokens(model(liked), model(flat), ids, .25) == (1,)          # of the types that occur as next tokens: 1, 2, 3, 4
    assert impactful_tokens(model(liked), model(flat), ids, 1.) == (1, 2, 3, 4)
    with pytest.raises(PoseError): impactful_tokens(model(liked), model(flat), ids, 0.)
