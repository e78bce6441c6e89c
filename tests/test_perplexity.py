import copy, json, math, os, signal, socket, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pose_nb.common import PoseError
from pose_nb.perplexity import (PerplexityResult, PerplexityRow, bos_of, check_lengths, context_gain, context_lengths, context_perplexity, evaluating, gain_plot,
                                mean_over_documents, nll_by_position, perplexity, pool, position_plot, reading_flops, readings, score_window, tokens_per_forward,
                                tokens_read, truncated_perplexity, windows)
sys.path.insert(0, str(Path(__file__).parent/'bench'))
import bench

torch.set_num_threads(1)
V = 50
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=.2)


def llama(**kw):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **kw})).eval()


def docs(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, V, n) for n in sizes]


class Unigram(LlamaForCausalLM):
    "Predicts token i with probability proportional to exp(i / 10), whatever came before: every NLL is known."
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, V)
        torch.nn.init.zeros_(self.lm_head.weight)
        self.lm_head.bias.data = torch.arange(V) / 10


UNI = Unigram(LlamaConfig(**SMALL)).eval()
LOGP = (torch.arange(V).double() / 10).log_softmax(0).numpy()


@given(st.integers(1, 400), st.integers(1, 80), st.data())
def test_windows_score_every_token_once(T, W, data):
    S = data.draw(st.integers(1, W))
    ws = windows(T, W, S)
    assert sum(s for *_, s in ws) == T and all(s >= 1 for *_, s in ws)
    assert np.array_equal(np.concatenate([np.arange(e - s, e) for _, e, s in ws]), np.arange(T))
    assert all(e - b <= W for b, e, _ in ws) and ws[-1][1] == T
    c = context_lengths(T, W, S)
    assert c.shape == (T,) and (c[W:] >= W - S).all() and (c < W).all()


@pytest.mark.parametrize('W,n', [(2047, 32), (16_383, 18)])
def test_golden_windows(W, n):
    ws = windows(32_768, W, 1024)
    assert len(ws) == n and ws[-1][2] == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.data())
def test_no_off_by_one(length, data):
    "A model whose every NLL is known: the mean is exact for any window, stride and BOS rule."
    stride = data.draw(st.integers(1, length - 1))
    bos = data.draw(st.sampled_from([None, False]))
    ds = docs(60, 45, seed=length)
    row = perplexity(UNI, ds, length, stride=stride, bos=bos, chunk=data.draw(st.sampled_from([5, 64, 1000]))).rows[0]
    scored = np.concatenate(ds if bos is None else [d[1:] for d in ds])
    assert row.scored == len(scored)
    assert row.nll == pytest.approx(-LOGP[scored].mean(), abs=1e-5)
    for d, t in zip(ds, row.token_nll):
        k = 0 if bos is None else 1
        assert np.isnan(t[:k]).all() and np.allclose(t[k:], -LOGP[d[k:]], atol=1e-5)


def test_uniform_model_has_vocabulary_perplexity():
    m = llama(); torch.nn.init.zeros_(m.lm_head.weight)
    for length in (2, 9, 40):
        for stride in (1, length - 1):
            for bos in (None, False, 7): assert perplexity(m, docs(40), length, stride=stride, bos=bos).rows[0].ppl == pytest.approx(V, rel=1e-6)


def test_against_a_slow_oracle():
    m, d, W, S = llama(), docs(70)[0], 20, 6
    total = n = 0
    for b, e, s in windows(70, W - 1, S):
        x = torch.tensor(np.r_[0, d[b:e]])[None]
        labels = x.clone(); labels[:, :-s] = -100
        with torch.inference_mode(): total += m(x, labels=labels).loss.item() * s
        n += s
    row = perplexity(m, [d], W, stride=S).rows[0]
    assert row.scored == n == 70 and row.nll == pytest.approx(total / n, abs=1e-5)
    assert row.stderr is None and row.interval is None


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=16, final_logit_softcapping=2., query_pre_attn_scalar=16)).eval()

def mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=24)).eval()

def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()

def dynamic():  return llama(rope_parameters=dict(rope_type='dynamic', rope_theta=100., factor=4.), max_position_embeddings=32)

def longrope(): return llama(rope_parameters=dict(rope_type='longrope', rope_theta=100., short_factor=[1.] * 8, long_factor=[4.] * 8, factor=4.,
                                                 original_max_position_embeddings=32), max_position_embeddings=128)


@pytest.mark.parametrize('make', [llama, qwen3, gemma2, mistral, dynamic, longrope])
def test_chunked_equals_whole(make):
    m, ids = make(), torch.tensor(np.stack(docs(90, 90)))
    with torch.inference_mode():
        ref = -m(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        for chunk in (None, 7, 32, 89, 90):
            for scored in (1, 8, 89): assert torch.allclose(score_window(m, ids, scored, chunk), ref[:, -scored:].double(), atol=1e-5), (chunk, scored)


@pytest.mark.parametrize('make', [dynamic, longrope, llama])
def test_training_still_works_after_measuring(make):
    m = make().train(); m.model.layers[0].eval()
    perplexity(m, docs(80, 80), (16, 64))
    assert m.training and not m.model.layers[0].training and m.model.layers[1].training
    x = torch.tensor(docs(40)[0])[None]
    m(x, labels=x).loss.backward()


def test_mode_is_restored_after_an_error():
    m = llama().train()
    with pytest.raises(RuntimeError):
        with evaluating(m): raise RuntimeError
    assert m.training and torch.is_grad_enabled()


def test_batching_changes_nothing():
    ds = docs(64, 64, 50, 33)
    a, b = (perplexity(llama(), ds, (8, 32), stride=4, chunk=c) for c in (1000, 1))
    for x, y in zip(a.rows, b.rows):
        for s, t in zip(x.token_nll, y.token_nll): assert np.allclose(s, t, atol=1e-5)


def test_every_length_scores_the_same_tokens():
    r = perplexity(llama(), docs(100, 30, 64, 63, 62), (8, 16, 64))
    assert {(x.scored, x.documents, x.excluded) for x in r.rows} == {(227, 3, 2)}      # 63 tokens and BOS fill 64
    kept = perplexity(llama(), docs(100, 30, 64, 63, 62), (8, 16, 64), keep_short=True)
    assert {(x.scored, x.documents, x.excluded) for x in kept.rows} == {(319, 5, 0)}
    assert {x.scored for x in perplexity(llama(), docs(100, 90), (8, 16, 64), max_tokens=63).rows} == {126}
    assert json.loads(json.dumps(r.to_dict()))['rows'][0]['scored'] == 227


def test_context_perplexity_scores_the_same_last_tokens():
    m, ds = llama(), docs(60, 80)
    for bos in (None, False):
        r = context_perplexity(m, ds, (8, 20, 60), last=5, bos=bos)
        assert [x.scored for x in r.rows] == [10, 10, 10]
        for d, t in zip(ds, r[20].token_nll):
            x = torch.tensor(d[-20:] if bos is False else np.r_[0, d[-19:]])[None]
            with torch.inference_mode(): want = -m(x).logits[0, -6:-1].log_softmax(-1).gather(-1, x[0, -5:, None])[:, 0]
            assert np.isfinite(t).sum() == 5 and np.allclose(t[-5:], want, atol=1e-5)


def test_positions_profile_is_a_partition():
    row = perplexity(llama(), docs(100, 77), 32, stride=8).rows[0]
    for index in ('window', 'document'):
        for per in (1, 3):
            p = nll_by_position(row, index, per)
            assert sum(b['tokens'] for b in p) == row.scored
            assert sum(b['tokens'] * b['nll'] for b in p) / row.scored == pytest.approx(row.nll)


def test_ratio_error_covers():
    "About 95% of intervals from random documents contain the true mean."
    rng, hit = np.random.default_rng(0), 0
    for _ in range(400):
        n = rng.integers(50, 500, 12); s = n * 2. + n * rng.normal(0, .3, 12)
        _, _, (lo, hi) = mean_over_documents(s, n); hit += lo < 2 < hi
    assert 360 <= hit <= 395


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))])
def test_dtypes_and_devices(dtype, device):
    ref = perplexity(llama(), docs(80, 70), (16, 64)).ppl
    got = perplexity(llama().to(device, dtype), docs(80, 70), (16, 64), chunk=30).ppl
    for n in ref: assert got[n] == pytest.approx(ref[n], rel=.05 if dtype == torch.bfloat16 else 1e-4)


def test_bos_rules():
    assert bos_of(llama()) == 0 and bos_of(llama(), False) is None and bos_of(llama(), 0) == 0 and bos_of(llama(bos_token_id=None)) is None
    with pytest.raises(PoseError, match='no bos_token_id'): bos_of(llama(bos_token_id=None), True)


def test_budget_of_logits():
    m = copy.copy(llama()); m.config = copy.copy(m.config)
    for vocab, want in ((50, 2048), (128_256, 1046), (2_000_000, 128)):
        m.config.vocab_size = vocab
        assert tokens_per_forward(m) == want and tokens_per_forward(m, 5) == 5


D = docs(40)
@pytest.mark.parametrize('documents,kw,says', [
    (D, dict(lengths=()), 'empty'), (D, dict(lengths=(8, 8)), 'increasing'), (D, dict(lengths=(16, 8)), 'increasing'), (D, dict(lengths=0), 'at least 2'),
    (D, dict(lengths=1), 'at least 2'), (D, dict(lengths=8.5), 'whole number'), (D, dict(lengths=True), 'whole number'), (D, dict(lengths='16'), 'whole number'),
    (D, dict(lengths=16, stride=16), 'at most 15'), (D, dict(lengths=16, stride=17, bos=False), 'at most 16'), (D, dict(lengths=16, stride=0), 'at least 1'),
    (D, dict(lengths=64), 'up to 41'), (D, dict(lengths=64, bos=False), 'up to 40'), ([], dict(lengths=16), 'no documents'), ([[]], dict(lengths=16), 'empty'),
    ('text', dict(lengths=16), 'tokenise'), (['text'], dict(lengths=16), 'tokenise'), ([[1.5, 2.]], dict(lengths=16), 'integers'), (D[0], dict(lengths=16), 'dimensions'),
    ([[3, V]], dict(lengths=16), 'tokenizer of this model'), ([[-1, 3]], dict(lengths=16), 'tokenizer of this model'), ([[0, 3]], dict(lengths=16), 'already begins'),
    (D, dict(lengths=16, max_tokens=5), 'max_tokens'), (D, dict(lengths=16, bos=V), 'bos'), (D, dict(lengths=16, bos='x'), 'bos'), (D, dict(lengths=16, chunk=0), 'chunk'),
    ([[5]], dict(lengths=2, bos=False, keep_short=True), 'no token')])
def test_bad_requests_are_one_sentence(documents, kw, says):
    with pytest.raises(PoseError, match=says): perplexity(llama(), documents, **kw)


def test_other_bad_requests():
    with pytest.raises(PoseError, match='at most 4'): windows(10, 4, 5)
    with pytest.raises(PoseError, match='cannot hold'): context_perplexity(llama(), D, (8, 16), last=8)
    with pytest.raises(PoseError, match='choose one of'): nll_by_position(perplexity(llama(), D, 16).rows[0], 'sentence')
    with pytest.raises(PoseError, match='no row'): perplexity(llama(), D, 16)[32]
    broken = llama(); broken.lm_head.weight.data[:] = float('nan')
    with pytest.raises(PoseError, match='not a finite'): perplexity(broken, D, 16)
    assert check_lengths(64) == (64,) and check_lengths([np.int64(8), 16]) == (8, 16) and math.isclose(perplexity(llama(), [D[0].tolist()], 16).ppl[16], perplexity(llama(), [torch.tensor(D[0])], 16).ppl[16])


# ── against a naive reference: every window by itself, in one piece, with all its logits ──
def naive(model, documents, length, stride, bos):
    "NLL of every token of every document."
    out, head = [], [] if bos is None else [bos]
    for d in documents:
        nll, done = np.full(len(d), np.nan), 0
        for b in range(0, len(d), stride):
            e = min(b + length - len(head), len(d))
            x = torch.tensor(np.r_[head, d[b:e]].astype(np.int64))[None]
            fresh = copy.deepcopy(model) if model.config.rope_parameters['rope_type'] == 'dynamic' else model     # it remembers what it has read
            with torch.inference_mode(): losses = -fresh(x).logits[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0].double().numpy()
            every = losses if head else np.r_[np.nan, losses]
            nll[done:e] = every[done - b:]
            done = e
            if e == len(d): break
        out.append(nll)
    return out

def same(a, b, eps): return all(np.allclose(x, y, atol=eps, rtol=0, equal_nan=True) for x, y in zip(a, b, strict=True))

DOUBLE = llama().double()

@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_request_equals_the_naive_reference(data):
    "Any window, stride, BOS, number of lengths, batch and chunk."
    draw = lambda *a: data.draw(st.integers(*a))
    model, eps = data.draw(st.sampled_from([(llama(), 1e-5), (DOUBLE, 1e-9)]))
    lengths = sorted({draw(2, 50) for _ in range(draw(1, 3))})
    bos = data.draw(st.sampled_from([None, 7, False]))
    stride = data.draw(st.one_of(st.none(), st.integers(1, lengths[0] - (bos is not False))))
    ds = docs(*[draw(1, 70) for _ in range(draw(1, 3))], lengths[-1], seed=draw(0, 99))
    ds = [np.where(d == 7, 8, d) for d in ds]
    r = perplexity(model, ds, lengths, stride, bos, keep_short=True, chunk=draw(1, 120))
    token = {None: 0, 7: 7, False: None}[bos]
    for row in r.rows:
        want = naive(model, ds, row.length, stride or max(1, row.length // 2), token)
        assert row.bos == token and same(row.token_nll, want, eps) and row.scored == np.isfinite(np.concatenate(want)).sum()
        assert row.nll == pytest.approx(np.nanmean(np.concatenate(want)), abs=eps)


@pytest.mark.parametrize('make', [llama, qwen3, gemma2, mistral, dynamic, longrope])
def test_shared_beginnings_change_no_number(make):
    "Also with sliding-window attention, and where nothing may be shared because frequencies follow the length."
    m, ds = make(), docs(100, 90)
    for stride in (None, 8):
        r = perplexity(m, ds, (16, 32, 64), stride)
        for row in r.rows: assert same(row.token_nll, naive(make(), ds, row.length, stride or row.length // 2, 0), 1e-5), (row.length, stride)
    cut = truncated_perplexity(m, ds, (16, 32, 64))
    for row in cut.rows: assert same(row.token_nll, [np.r_[a, np.full(len(d) - row.length + 1, np.nan)] for a, d in zip(naive(make(), [d[:row.length - 1] for d in ds], row.length, row.length - 1, 0), ds)], 1e-5)


def test_dynamic_ntk_does_not_remember_what_it_read_before():
    m, d = dynamic(), docs(90)
    first = perplexity(m, d, 48).rows[0]
    perplexity(m, d, 80)
    assert perplexity(m, d, 48).rows[0] == first


@pytest.mark.parametrize('make,rows', [(llama, 2), (dynamic, 6)])
def test_what_is_read_once_and_what_is_not(make, rows):
    "Lengths that begin at the same token are one reading, except where frequencies follow the length."
    m, seen = make(), []
    m.model.register_forward_pre_hook(lambda module, args, kw: seen.append(kw['input_ids'].shape), with_kwargs=True)
    r = truncated_perplexity(m, docs(80, 80), (16, 32, 64), chunk=1000)
    assert sum(a for a, _ in seen) == rows
    assert [x.scored for x in r.rows] == [30, 62, 126] and [x.stride for x in r.rows] == [None] * 3 and {x.protocol for x in r.rows} == {'truncated'}


@given(st.integers(1, 200), st.lists(st.integers(2, 60), min_size=1, max_size=3, unique=True), st.integers(1, 60), st.booleans())
def test_readings_serve_every_plan(T, lengths, stride, bos):
    head = int(bos)
    plans = [[(0, *w) for w in windows(T, n, min(stride, n))] for n in lengths]
    together, apart = readings(plans, head), readings(plans, head, share=False)
    for rs in (together, apart):
        scored = [sorted(t for _, b, parts in rs for k, lo, hi in parts if k == j for t in range(b + lo, b + hi)) for j in range(len(plans))]
        assert scored == [[t for _, b, e, s in p for t in range(max(e - s, b + 1 - head), e)] for p in plans]
    assert len({b for _, b, _ in together}) == len(together) and tokens_read(together, head) <= tokens_read(apart, head)
    if all(n >= stride for n in lengths): assert {b for _, b, _ in together} <= set(range(0, T, stride))


def test_the_counted_work_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    m = llama(attn_implementation='eager')
    size = dict(inner=sum(p.numel() for n, p in m.named_parameters() if p.ndim > 1 and 'embed' not in n and 'lm_head' not in n), layers=2, width=32, vocab=V)
    n = 60
    with FlopCounterMode(display=False) as seen, torch.inference_mode(): score_window(m, torch.tensor(docs(n)[0])[None], 20)
    causal = 2 * 2 * 32 * n**2                                   # eager attention multiplies the masked half too
    assert seen.get_total_flops() - causal == reading_flops([(0, 0, ((0, n - 20, n),))], head=0, **size)


# ── last tokens, positions, gains, pooling ──
def test_a_gain_is_paired_by_document():
    m, ds = llama(), docs(80, 90, 70)
    r = context_perplexity(m, ds, (8, 20, 60), last=5)
    gains = context_gain(r)
    assert [(g.against, g.length, g.documents, g.scored) for g in gains] == [(8, 20, 3, 15), (8, 60, 3, 15)]
    for g in gains:
        d = np.array([np.nansum(a - b) / 5 for a, b in zip(r[8].token_nll, r[g.length].token_nll)])
        assert g.gain == pytest.approx(d.mean()) and g.stderr == pytest.approx(d.std(ddof=1) / math.sqrt(3)) and np.allclose(g.per_document, d)
        assert g.better == (d > 0).sum() and g.interval[0] < g.gain < g.interval[1] and 'per_document' not in g.to_dict()
    assert [g.length for g in context_gain(r, against=20)] == [60] and context_gain(context_perplexity(m, ds[:1], (8, 20), last=5))[0].interval is None
    gain_plot({'base': gains}, window=20)
    uniform = llama(); torch.nn.init.zeros_(uniform.lm_head.weight)
    assert all(g.gain == pytest.approx(0, abs=1e-7) for g in context_gain(perplexity(uniform, ds, (8, 32))))


def test_positions_carry_intervals_over_documents():
    row = perplexity(llama(), docs(100, 77, 90), 32, stride=8).rows[0]
    p = nll_by_position(row, 'document')
    for b in p:
        hit = [np.floor(np.log2(np.arange(len(t)) + 1)).astype(int) == int(math.log2(b['position'])) for t in row.token_nll]
        mean, _, (low, high) = mean_over_documents(*zip(*[(t[h].sum(), h.sum()) for t, h in zip(row.token_nll, hit)]))
        assert (b['nll'], b['low'], b['high']) == pytest.approx((mean, low, high))
    alone = nll_by_position(perplexity(llama(), docs(100), 32).rows[0])
    assert all(b['low'] is None and b['high'] is None for b in alone)
    position_plot({'base': p, 'pose': alone}, window=16)


def test_the_window_index_of_last_tokens_is_what_was_read_before_them():
    r = context_perplexity(llama(), docs(80, 90), (16, 64), last=4)
    assert [round(b['position']) for n in (16, 64) for b in nll_by_position(r[n], per_octave=9)] and nll_by_position(r[16])[-1]['position'] <= 15 < 60 < nll_by_position(r[64])[-1]['position'] <= 63
    assert nll_by_position(truncated_perplexity(llama(), docs(80), 64).rows[0])[-1]['position'] < 64


def test_pooling_is_measuring_together():
    m, ds = llama(), docs(100, 64, 80)
    for measure in (lambda d: perplexity(m, d, (8, 16, 60), chunk=1), lambda d: truncated_perplexity(m, d, (8, 60), chunk=1), lambda d: context_perplexity(m, d, (8, 60), last=3, chunk=1)):
        whole, pooled = measure(ds), pool(measure([d]) for d in ds)
        assert pooled.rows == whole.rows                                         # bit by bit, with one reading per forward pass
        for a, b in zip(pooled.rows, whole.rows): assert same(a.token_nll, b.token_nll, 0)
        assert pool([pool([measure(ds[:2])]), measure(ds[2:])]).rows == whole.rows
    stored = [PerplexityResult([PerplexityRow(**json.loads(json.dumps(r.to_dict())), token_nll=r.token_nll) for r in perplexity(m, [d], (8, 60), chunk=1).rows]) for d in ds]
    assert pool(stored).rows == perplexity(m, ds, (8, 60), chunk=1).rows


def test_only_like_with_like_is_pooled():
    m, ds = llama(), docs(64, 64)
    one = perplexity(m, ds[:1], (8, 16))
    for other in (perplexity(m, ds, (8, 32)), perplexity(m, ds, (8, 16), stride=2), perplexity(m, ds, (8, 16), bos=False), truncated_perplexity(m, ds, (8, 16))):
        with pytest.raises(PoseError, match='measured alike'): pool([one, other])
    with pytest.raises(PoseError, match='measured alike'): pool([context_perplexity(m, ds, (8, 16), last=k) for k in (3, 4)])
    with pytest.raises(PoseError, match='no results'): pool([])
    bare = PerplexityResult([PerplexityRow(**r.to_dict()) for r in one.rows])
    for f in (lambda: pool([bare]), lambda: context_gain(bare), lambda: nll_by_position(bare.rows[0])):
        with pytest.raises(PoseError, match='no NLL per token'): f()
    with pytest.raises(PoseError, match='score different tokens'): context_gain(truncated_perplexity(m, ds, (8, 16)))
    with pytest.raises(PoseError, match='nothing is longer'): context_gain(perplexity(m, ds, 16))
    with pytest.raises(PoseError, match='up to 65'): truncated_perplexity(m, ds, 128)


# ── memory ──
@pytest.mark.parametrize('measure', [perplexity, truncated_perplexity, lambda *a, **kw: context_perplexity(*a, last=6, **kw)])
def test_no_logits_beyond_a_chunk(measure):
    m, seen = llama(), []
    m.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    for chunk in (1, 7, 50):
        seen.clear(); measure(m, docs(100, 100, 64, 64), (8, 32, 64), chunk=chunk)
        assert 0 < max(seen) <= chunk


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
def test_memory_of_a_window_of_16k_tokens_and_32k_vocabulary():
    assert bench.peak_of('perplexity', 'ours') <= .3 * bench.peak_of('perplexity', 'official')


def test_the_benchmark_compares_the_same_number():
    m, ds = bench.reader('layers'), bench.reading_documents('layers', 300, 2)
    for n, s in ((64, 32), (128, 10)): assert bench.official_perplexity(m, ds, n, s) == pytest.approx(perplexity(m, ds, n, s).ppl[n], rel=1e-6)
    assert bench.flops_ratio('vocabulary', ds, (64,), 32) > bench.flops_ratio('layers', ds, (64,), 32) > 1


# ── several processes ──
WORKER = """
import sys, numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_perplexity import PoseError, context_perplexity, docs, llama, perplexity, truncated_perplexity
from pose_nb.engines import join, leave
state = join()
assert state.num_processes == 2
def nlls(r): return [t for row in r.rows for t in row.token_nll]
m, ds = llama(), docs(100, 64, 80, 64)
found = [nlls(f(m, ds, (8, 16, 60), shared=True, chunk=100)) for f in (perplexity, truncated_perplexity, lambda *a, **kw: context_perplexity(*a, last=5, **kw))]
np.savez(f'{sys.argv[2]}/{state.process_index}.npz', *[t for f in found for t in f])
broken = llama(); broken.lm_head.weight.data[:] = float('nan')
try: perplexity(broken, ds, 16, shared=True)
except PoseError as e: assert 'finite' in str(e)
else: leave(3)
leave(0)
"""

def test_two_processes_give_the_numbers_of_one(tmp_path):
    (tmp_path/'worker.py').write_text(WORKER)
    here = Path(__file__).parent
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    words = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', here.parent/'configs'/'accelerate'/'ddp.yaml', '--num_processes', 2, '--main_process_port', port, tmp_path/'worker.py', here, tmp_path]
    job = subprocess.Popen([str(w) for w in words], env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(here.parent)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = job.communicate(timeout=150)
    finally: job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, out[-3000:]
    m, ds = llama(), docs(100, 64, 80, 64)
    alone = [t for f in (perplexity, truncated_perplexity, lambda *a, **kw: context_perplexity(*a, last=5, **kw)) for row in f(m, ds, (8, 16, 60), chunk=100).rows for t in row.token_nll]
    for i in (0, 1):
        got = np.load(tmp_path/f'{i}.npz')
        assert len(got.files) == len(alone) and all(np.array_equal(got[f'arr_{k}'], t, equal_nan=True) for k, t in enumerate(alone))


def test_the_bar_counts_every_token(monkeypatch):
    import pose_nb.perplexity as module
    seen = []
    class Bar:
        def __init__(self, total, **kw): self.n, self.total = 0, total; seen.append(self)
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def update(self, k): self.n += k
    monkeypatch.setattr(module, 'tqdm', Bar)
    perplexity(llama(), docs(100, 64), (8, 16, 60), progress=True)
    assert seen[0].n == seen[0].total > 0
