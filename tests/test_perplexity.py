import copy, json, math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pose_nb.common import PoseError
from pose_nb.perplexity import (bos_of, check_lengths, context_lengths, context_perplexity, evaluating, mean_over_documents, nll_by_position,
                                perplexity, score_window, tokens_per_forward, windows)

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
