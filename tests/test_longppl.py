"""LongPPL against a slow reading of its definition, the transfer between tokenizers, and bad requests."""
import json, math

import numpy as np, pytest, torch
from conftest import make_model, make_texts, make_tokenizer
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pose_nb.common import PoseError
from pose_nb.longppl import KeyTexts, carry_over, key_mask, key_tokens, long_perplexity, mark_keys, over_keys, score_keys
from pose_nb.perplexity import perplexity, truncated_perplexity

INF, TOK, MODEL = math.inf, make_tokenizer(), make_model()
TEXTS = make_texts(4, 60)
ALL = dict(alpha=-INF, beta=-INF)


def docs(*sizes, seed=0): return [np.random.default_rng(seed + i).integers(2, 300, n) for i, n in enumerate(sizes)]


def released(full, d, context, step, model, bos, alpha, beta):
    "Key tokens as the released loop finds them, window by window; BOS in front of each."
    keys = []
    for start in range(0, len(d) - context, step):
        end = min(start + context + step, len(d))
        x = torch.tensor(np.r_[bos, d[start:end]])[None]
        with torch.inference_mode(): loss = -model(x).logits[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0].double().numpy()
        for i in range(start + context, end):
            if loss[i - start] - full[i] > alpha and full[i] < beta * -1: keys.append(i)
    return keys


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_key_tokens_are_those_of_the_released_loop(data):
    context, step, chunk = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)), data.draw(st.integers(5, 200))
    alpha, beta = data.draw(st.sampled_from([(2., -2.), (.5, -9.), (-.5, -6.), (-INF, -INF)]))
    ds = docs(*data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=3)), seed=data.draw(st.integers(0, 50)))
    for d, k in zip(ds, key_tokens(MODEL, ds, context, step, alpha, beta, chunk=chunk)):
        x = torch.tensor(np.r_[0, d])[None]
        with torch.inference_mode(): full = -MODEL(x).logits[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0].double().numpy()
        assert np.allclose(k.full, full, atol=1e-5)
        margin = np.min([np.abs(k.short - k.full - alpha), np.abs(k.full + beta)], axis=0) if alpha > -INF else np.ones(len(d))
        found, want = set(np.flatnonzero(k.key)), set(released(full, d, context, step, MODEL, 0, alpha, beta))
        assert all(margin[i] < 1e-4 for i in found ^ want)                     # a threshold may fall on either side of a rounding
        assert np.allclose(k.short[:context + step], k.full[:context + step], atol=1e-5)      # both contexts begin at the first token


def test_the_sign_of_beta_and_both_thresholds():
    full, short = np.array([0., 1.99, 2.01, .5, .5, np.nan]), np.array([9., 9, 9, 2.49, 2.51, 9])
    assert key_mask(full, short, 0).tolist() == [True, True, False, False, True, False]
    assert not key_mask(full, short, 6).any()


@given(st.integers(1, 60), st.integers(0, 70))
def test_settings_that_take_everything_take_all_from_the_context_on(n, context):
    r = np.random.default_rng(n)
    assert np.array_equal(key_mask(r.exponential(3, n), r.exponential(3, n), context, -INF, -INF), np.arange(n) >= context)


def test_everything_is_a_perplexity():
    "With all tokens key from `context` on, LongPPL is the mean of the losses there."
    r = long_perplexity(MODEL, TOK, TEXTS, MODEL, TOK, context=20, step=7, **ALL)
    ids = [np.array(TOK(t, add_special_tokens=False)['input_ids']) for t in TEXTS]
    losses = [truncated_perplexity(MODEL, [d], len(d) + 1).rows[0].token_nll[0] for d in ids]
    assert r.keys == r.evaluator_keys == sum(len(d) - 20 for d in ids)
    assert r.nll == pytest.approx(np.concatenate([t[20:] for t in losses]).mean()) and r.ppl == pytest.approx(math.exp(np.concatenate(losses).mean()))
    assert r.tokens == sum(map(len, ids)) and (r.documents, r.without_keys, r.excluded) == (4, 0, 0)


# ── the mean ──
def test_only_key_losses_count_and_each_counts_once():
    nlls = [np.array([np.nan, 1., 2., 9.]), np.array([5., 5., 3.]), np.array([7.])]
    masks = [np.array([True, False, True, False]), np.array([False, False, True]), np.array([False])]
    r = over_keys(nlls, masks)
    assert (r['keys'], r['documents'], r['without_keys'], r['nll']) == (2, 2, 1, 2.5) and r['interval'][0] < r['longppl'] < r['interval'][1]
    assert [d['key_nll'] for d in r['per_document']] == [2., 3., None]
    rng = np.random.default_rng(0)
    other = [np.where(m, t, rng.permutation(np.where(np.isnan(t), 4, t))) for t, m in zip(nlls, masks)]
    assert over_keys(other, masks)['nll'] == 2.5
    more = over_keys(nlls + [np.full(9, 8.)], masks + [np.ones(9, bool)])
    assert more['nll'] == pytest.approx((2 + 3 + 72) / 11)                     # weighted by key tokens
    assert over_keys(nlls[:1], masks[:1])['interval'] is None


def test_a_first_token_without_a_loss_is_not_the_last_one():
    keys = KeyTexts('hand', 1, 1, 2., -2., None, 0, 1, TEXTS[:1], [[(0, len(TEXTS[0]))]])
    without, with_bos = score_keys(MODEL, TOK, keys, bos=False), score_keys(MODEL, TOK, keys)
    n = len(TOK(TEXTS[0], add_special_tokens=False)['input_ids'])
    assert (without.keys, with_bos.keys) == (n - 1, n)
    ids = np.array(TOK(TEXTS[0], add_special_tokens=False)['input_ids'])
    assert without.nll == pytest.approx(perplexity(MODEL, [ids], n, stride=n, bos=False).rows[0].nll)


# ── the transfer ──
def letters():
    tok = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(''.join(TEXTS))))}, unk_token=' '))
    tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return PreTrainedTokenizerFast(tokenizer_object=tok)


def spans_of(tok, text): return np.array(tok(text, add_special_tokens=False, return_offsets_mapping=True)['offset_mapping'])


@given(st.text(min_size=1, max_size=60), st.data())
def test_the_same_tokenizer_gives_the_same_tokens_back(text, data):
    spans = spans_of(TOK, text)
    key = np.array(data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans))), bool)
    got = carry_over(text, spans[key], spans)
    assert got[key].all()
    for a, b in spans[got & ~key]: assert any(x < b and a < y for x, y in spans[key])         # only parts of a character that is key


@given(st.text(alphabet='ab \n日é', min_size=1, max_size=40), st.data())
def test_carried_over_by_brute_force(text, data):
    def some(): return [tuple(sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))) for _ in range(data.draw(st.integers(0, 5)))]
    keys, spans = some(), some()
    inside = {i for a, b in keys for i in range(a, b)}
    def want(a, b):
        ink = [i for i in range(a, b) if not text[i].isspace()]
        return bool(ink or b > a) and all(i in inside for i in (ink or range(a, b)))
    assert carry_over(text, keys, spans).tolist() == [want(a, b) for a, b in spans]


def test_letters_inherit_from_words():
    keys = mark_keys(MODEL, TOK, TEXTS, context=20, step=7, **ALL)
    by_letter = letters()
    small = make_model(vocab=len(by_letter), bos_token_id=None)
    r = score_keys(small, by_letter, keys)
    assert r.bos is None and r.evaluator_bos == 0 and r.evaluator_keys == keys.tokens < r.keys
    for t, spans in zip(TEXTS, keys.spans):
        got, first = carry_over(t, spans, spans_of(by_letter, t)), spans_of(TOK, t)[20, 0]
        assert not got[:first].any() and all(got[i] for i in range(first, len(t)) if not t[i].isspace())


# ── results and requests ──
def test_a_result_says_what_it_is():
    r = long_perplexity(MODEL, TOK, TEXTS + ['short'], MODEL, TOK, context=20, step=7, alpha=-9., beta=-99., max_tokens=60, name='me')
    d = json.loads(json.dumps(r.to_dict()))
    assert (d['evaluator'], d['context'], d['step'], d['alpha'], d['beta'], d['excluded']) == ('me', 20, 7, -9., -99., 1) and 'per_document' not in d
    assert len(r.table()) == 4 and r.tokens == 240


def test_marks_survive_a_file():
    keys = mark_keys(MODEL, TOK, TEXTS, context=20, step=7, **(ALL | dict(alpha=-1.)), max_tokens=60)
    again = KeyTexts(**json.loads(json.dumps(keys.to_dict())))
    assert keys.evaluator == 'LlamaForCausalLM' and score_keys(MODEL, TOK, again) == score_keys(MODEL, TOK, keys)


def test_logits_are_held_for_a_chunk():
    seen = []
    hook = MODEL.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    try: long_perplexity(MODEL, TOK, TEXTS, MODEL, TOK, context=20, step=7, chunk=11, **ALL)
    finally: hook.remove()
    assert 0 < max(seen) <= 11


class Slow: is_fast = False

@pytest.mark.parametrize('kw,says', [
    (dict(texts=TEXTS[0]), 'one string'), (dict(texts=[]), 'no texts'), (dict(texts=[[1, 2]]), 'text 0 is a list'), (dict(texts=['a b']), 'longer than the short context of 20'),
    (dict(evaluator_tokenizer=Slow()), "evaluator's tokenizer"), (dict(tokenizer=Slow()), "model's tokenizer"), (dict(context=0), 'context'), (dict(step=0), 'step'), (dict(step=2.5), 'step'),
    (dict(alpha=float('nan')), 'alpha'), (dict(beta='2'), 'beta'), (dict(alpha=99.), 'none of 4 documents'), (dict(max_tokens=20), 'longer than the short context'), (dict(chunk=0), 'chunk'),
    (dict(evaluator=make_model(vocab=20)), 'tokenizer of this model'), (dict(bos=10**6), 'bos'), (dict(texts=[''] * 3), 'longest has 0')])
def test_bad_requests_are_one_sentence(kw, says):
    with pytest.raises(PoseError, match=says) as e: long_perplexity(**dict(model=MODEL, tokenizer=TOK, texts=TEXTS, evaluator=MODEL, evaluator_tokenizer=TOK, context=20, step=7) | kw)
    assert '\n' not in str(e.value)
