"The middle of every retrieval test: however prompts are read, replies and scores are those of the slow way."
import copy, json

import numpy as np, pytest, torch
from dataclasses import dataclass
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import pose_nb.answers as answers
from conftest import make_tokenizer, make_texts
from pose_nb.answers import (Prompt, Reader, Task, Trunk, answer, continue_greedy, make_batches, make_trials, pooled_interval, prefill, reach, retrieve, score_answers, share_found, shared_start, stack_caches,
                             trial_rng, wilson)
from pose_nb.common import PoseError
from pose_nb.perplexity import _forget_lengths as forget

TOK = make_tokenizer()
SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=None, initializer_range=.2)
FAMILIES = [(LlamaForCausalLM, LlamaConfig, {}), (MistralForCausalLM, MistralConfig, dict(sliding_window=32)),
            (Gemma2ForCausalLM, Gemma2Config, dict(sliding_window=32, query_pre_attn_scalar=16)),
            (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=dict(rope_type='dynamic', factor=4., rope_theta=1e4)))]


def model(cls=LlamaForCausalLM, config=LlamaConfig, **kw):
    torch.manual_seed(0)
    return cls(config(**{**SMALL, **kw})).eval()


@dataclass(frozen=True)
class Hidden(Task):
    "A text with a letter in it, whose replies are never finished early."
    early:bool = False
    name = 'hidden'
    def prompt(self, tokenizer, length, depth, rng, bos):
        text, room = tokenizer(make_texts(1, 400)[0], add_special_tokens=False)['input_ids'], length - self.new_tokens - 2 - (bos is not None)
        at = int((rng.random() if depth is None else depth) * room)
        ids = [bos] * (bos is not None) + text[:at] + [int(rng.integers(2, 300))] + text[at:room] + [7]
        return Prompt(ids, rng.integers(2, 300, int(rng.integers(1, self.new_tokens + 1))).tolist(), ['zz'], dict(at=at))
    def finished(self, reply, prompt): return self.early and len(reply) > prompt.facts['at'] % 7


def by_hand(m, p, new_tokens):
    "No cache, everything read again for each token; NLL of the answer in one pass."
    x = torch.tensor([p.ids])
    with torch.inference_mode():
        for _ in range(new_tokens): x = torch.cat([x, m(x, attention_mask=torch.ones_like(x)).logits[:, -1:].argmax(-1)], 1)
        row, a = torch.tensor([p.ids + p.answer]), torch.tensor(p.answer)
        nll = -m(row).logits[0, len(p.ids) - 1:-1].log_softmax(-1).gather(-1, a[:, None]).mean()
    return TOK.decode(x[0, len(p.ids):], skip_special_tokens=True), nll.item()


@pytest.mark.parametrize('batch_tokens', [1, 100, 250, 10_000])
@pytest.mark.parametrize('chunk', [7, 2048])
@pytest.mark.parametrize('cls,config,kw', FAMILIES[:3])
def test_every_way_of_reading_is_the_slow_way(cls, config, kw, chunk, batch_tokens, monkeypatch):
    monkeypatch.setattr(answers, 'FAMILY', 3)
    m, task = model(cls, config, **kw), Hidden(6)
    prompts = [t['prompt'] for t in make_trials(task, TOK, (50, 90), (0., .4, 1.), trials=3, bos=0)]
    for p, got in zip(prompts, answer(m, TOK, task, prompts, batch_tokens, chunk), strict=True):
        reply, nll = by_hand(m, p, 6)
        assert got['reply'] == reply and got['nll'] == pytest.approx(nll, abs=1e-4) and got['tokens'] == len(p.ids) and got['at'] == p.facts['at']
        assert got['probability'] == pytest.approx(np.exp(-nll * len(p.answer)), rel=1e-3)


def test_frequencies_that_follow_the_length_are_never_read_in_parts():
    m, calls = model(*FAMILIES[3][:2], **FAMILIES[3][2]), []
    prompts = [t['prompt'] for t in make_trials(Hidden(3), TOK, (120,), trials=4, bos=0)]
    m.register_forward_pre_hook(lambda mod, a, kw: calls.append(a[0].shape[1]), with_kwargs=True)
    answer(m, TOK, Hidden(3), prompts, 1, 16)
    assert {c for c in calls if c <= 3} == {1}                             # nothing but the reply, token by token
    assert sorted(c for c in calls if c > 3) == sorted(n for p in prompts for n in (len(p.ids), len(p.ids + p.answer)))         # to reply, and to score


@pytest.mark.parametrize('batch_tokens', [1, 10_000])
def test_with_frequencies_that_follow_the_length_replies_are_those_of_generate_and_scores_those_of_one_pass(batch_tokens):
    "Lengths beyond the window of 64, where each new token changes the frequencies."
    m, task = model(*FAMILIES[3][:2], **FAMILIES[3][2] | dict(max_position_embeddings=64)), Hidden(6)
    prompts = [t['prompt'] for t in make_trials(task, TOK, (90, 120), (0., .4), trials=3, bos=0)]
    for p, got in zip(prompts, answer(m, TOK, task, prompts, batch_tokens), strict=True):
        forget(m)
        written = m.generate(torch.tensor([p.ids]), attention_mask=torch.ones(1, len(p.ids), dtype=torch.int64), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        forget(m)
        assert got['reply'] == TOK.decode(written[0, len(p.ids):], skip_special_tokens=True) and got['nll'] == pytest.approx(by_hand(m, p, 0)[1], abs=1e-5)
    same = [Prompt(p.ids, p.answer[:1], p.references, p.facts) for p in prompts]
    assert [g['reply'] for g in answer(m, TOK, task, same, batch_tokens)] == [g['reply'] for g in answer(m, TOK, task, prompts, batch_tokens)]


def test_pooled_intervals_count_questions_and_what_depths_add():
    rng, hit = np.random.default_rng(1), dict(alike=0, apart=0)
    for _ in range(400):
        one, each = rng.random(20) < .6, rng.random((20, 5)) < .6
        for name, marks in (('alike', np.repeat(one[:, None], 5, 1)), ('apart', each)):
            low, high = pooled_interval(marks.ravel().tolist(), np.repeat(np.arange(20), 5).tolist())
            hit[name] += low <= .6 <= high
    assert all(h >= .92 * 400 for h in hit.values()), hit
    assert pooled_interval([1] * 10, [0, 1] * 5) == wilson(2, 2) and pooled_interval([1, 0], [0, 0]) == wilson(.5, 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12), st.integers(1, 40))
def test_sorted_prompts_are_read_once_per_branch_and_batches_are_a_partition(rows, batch_tokens):
    prompts = [Prompt(r, [1], ['x'], {}) for r in rows]
    batches = make_batches(prompts, batch_tokens)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for b in batches: assert len({len(rows[i]) for i in b}) == 1 and (len(b) == 1 or len(b) * len(rows[b[0]]) <= batch_tokens)
    order = [rows[b[0]] for b in make_batches(prompts, 1)]
    assert sum(len(b) - shared_start(a, b) for a, b in zip([[]] + order, order)) == len({tuple(r[:i]) for r in rows for i in range(1, len(r) + 1)})


@pytest.mark.parametrize('cls,config,kw', FAMILIES)
def test_a_trunk_reads_what_is_new_and_caches_stack(cls, config, kw):
    m = model(cls, config, **kw)
    trunk, rng = Trunk(m, chunk=9), np.random.default_rng(0)
    a, b = rng.integers(2, 300, 70).tolist(), rng.integers(2, 300, 20).tolist()
    prompts = [a, a[:50] + b, a[:50] + b[::-1], a[:50] + b[::-1]]
    want = [70, 20, 20, 1] if cls is LlamaForCausalLM and not kw else [70] * 4            # a sliding window cannot be cut back
    logits, caches = [], []
    with torch.inference_mode():
        for p, n in zip(prompts, want):
            before = trunk.tokens_read
            logits.append(trunk.read(p)); caches.append(copy.deepcopy(trunk.cache))
            assert trunk.tokens_read - before == n
        ids = torch.tensor(prompts)
        assert torch.allclose(torch.cat(logits), m(ids, attention_mask=torch.ones_like(ids)).logits[:, -1], atol=1e-4)
        stacked, more = stack_caches(caches), torch.tensor([[5], [6], [7], [8]])
        got = answers._read(m, more, 70, stacked)[:, 0]
        if not kw.get('rope_parameters'): assert torch.allclose(got, m(torch.cat([ids, more], 1), attention_mask=torch.ones(4, 71, dtype=int)).logits[:, -1], atol=1e-4)
        for i, c in enumerate(caches): assert torch.allclose(got[i], answers._read(m, more[i:i + 1], 70, c)[0, 0], atol=1e-5)


@pytest.mark.parametrize('chunk', [7, 64, 2048])
@pytest.mark.parametrize('cls,config,kw', FAMILIES[:3])
def test_greedy_and_forced_equal_full_recompute(cls, config, kw, chunk):
    m = model(cls, config, **kw)
    ids, wanted = torch.randint(2, 300, (3, 100)), [[5, 6, 7, 8], [9], [10, 11]]
    with torch.inference_mode():
        logits, cache = prefill(m, ids, chunk)
        nll, first = score_answers(m, logits, 100, cache, wanted)
        new = continue_greedy(m, logits, 100, cache, 6)
        x = ids
        for _ in range(6): x = torch.cat([x, m(x, attention_mask=torch.ones_like(x)).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(new, x[:, 100:])
        for i, a in enumerate(wanted):
            row = torch.cat([ids[i], torch.tensor(a)])[None]
            want = -m(row).logits[0, 99:-1].log_softmax(-1).gather(-1, torch.tensor(a)[:, None]).mean()
            assert nll[i].item() == pytest.approx(want.item(), abs=1e-4) and not first[i]
        logits, cache = prefill(m, ids, chunk)
        assert score_answers(m, logits, 100, cache, [r[:4].tolist() for r in new])[1].all()


def test_greedy_equals_generate_without_touching_the_limit():
    m, seen, ids = model(), [], torch.randint(2, 300, (1, 190))
    hook = m.register_forward_pre_hook(lambda mod, a, kw: seen.append(int(kw['position_ids'].max())), with_kwargs=True)
    with torch.inference_mode(): logits, cache = prefill(m, ids); new = continue_greedy(m, logits, 190, cache, 10)
    assert max(seen) == 198 < 200 - 1                                        # the last token is written, not read
    hook.remove()
    stock = m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(stock[:, 190:], new)


@pytest.mark.parametrize('batch_tokens', [1, 10_000])
def test_a_finished_row_is_not_changed_by_its_neighbours(batch_tokens):
    m, late, early = model(), Hidden(10), Hidden(10, early=True)
    prompts = [t['prompt'] for t in make_trials(early, TOK, (60,), trials=8, bos=0)]
    whole, short = (answer(m, TOK, t, prompts, batch_tokens) for t in (late, early))
    assert any(s['written'] < 10 for s in short)
    for p, w, s in zip(prompts, whole, short):
        assert w['reply'].startswith(s['reply']) and (early.finished(s['reply'], p) or s['written'] == 10) and s['nll'] == pytest.approx(w['nll'], abs=1e-5)


def test_what_follows_the_end_does_not_count_whichever_end():
    class Says(Task):
        name = 'says'
        def prompt(self, tokenizer, length, depth, rng, bos): return Prompt(tokenizer('sea ?')['input_ids'], [5], ['wind'], {})
    say = lambda text: retrieve(Reader(TOK, lambda t: text, ' ?'), TOK, Says(), 64, trials=2, bos=False).accuracy[64]
    assert say(' wind') == 1 and say('</s> wind') == 0 and say(' sea</s> wind') == 0
    m = model(); m.generation_config.eos_token_id = [int(continue_greedy(m, *(lambda l, c: (l, 5, c))(*prefill(m, torch.tensor([[1, 2, 3, 4, 5]]))), 1))]
    class Five(Says): prompt = lambda self, tokenizer, length, depth, rng, bos: Prompt([1, 2, 3, 4, 5], [5], ['wind'], {})
    with torch.inference_mode(): assert answer(m, TOK, Five(), [Five().prompt(TOK, 64, None, None, None)])[0] | dict(nll=0, probability=0) == dict(
        tokens=5, reply='', written=1, mark=0., nll=0, probability=0, forced=False)


def test_marks_intervals_and_reach():
    assert share_found(' A1 b2', ['a1', 'c3']) == .5 and share_found('', ['x']) == 0
    for c, n in ((0, 5), (3, 7), (7, 7), (1, 1), (50, 100)):
        ci = binomtest(c, n).proportion_ci(method='wilson')
        assert wilson(c, n) == pytest.approx((ci.low, ci.high), abs=1e-12)
    assert wilson(2, 8)[0] < wilson(2.5, 8)[0] < wilson(3, 8)[0]
    assert reach({1: .9, 2: .85, 3: .9}) == 1 and reach({1: .9, 2: .85, 3: .9}, .8) == 3 and reach({}) == 0 == reach({1: .1})


def test_trials_are_independent_of_each_other():
    a, b = make_trials(Hidden(), TOK, (60, 90), trials=4, bos=0), make_trials(Hidden(), TOK, (90,), trials=2, bos=0)
    assert [t['prompt'] for t in a if t['length'] == 90][:2] == [t['prompt'] for t in b]
    assert trial_rng(0, 60, 1).random() == trial_rng(0, 60, 1).random() != trial_rng(1, 60, 1).random()


def test_rows_pool_and_are_plain_data():
    got = retrieve(model(), TOK, Hidden(4), (40, 60), (0., 1.), trials=3)
    assert [(r.length, r.depth, r.trials) for r in got.rows] == [(40, 0., 3), (40, 1., 3), (60, 0., 3), (60, 1., 3)]
    d = json.loads(json.dumps(got.to_dict()))
    assert d['task'] == 'hidden' and d['rows'][0]['protocol'] == dict(task='hidden', new_tokens=4, early=False) and d['rows'][0]['bos'] == 0
    assert got.rows[0].accuracy == np.mean([t['mark'] for t in got.trials[:3]]) and got.accuracy[40] == 0 and got.intervals[40] == wilson(0, 3)       # three questions at two depths


def test_two_ends_of_a_map(tmp_path):
    import matplotlib.pyplot as plt
    from pose_nb.answers import depth_plot
    ax = depth_plot(retrieve(model(), TOK, Hidden(4), (40, 60), (0., .5, 1.), trials=3))
    assert {t.get_text() for t in ax.texts} >= {'0/3', '0% to 56%'}
    plt.close(ax.figure)


@pytest.mark.parametrize('kw,says', [(dict(lengths=(90, 60)), 'increasing'), (dict(depths=(0, 2)), 'depths'), (dict(trials=0), 'trials'), (dict(seed=2**64), 'seed'), (dict(chunk=0), 'chunk'),
                                     (dict(batch_tokens=0), 'batch_tokens'), (dict(bos=999), 'knows 0 to 299')])
def test_bad_requests_are_one_sentence(kw, says):
    with pytest.raises(PoseError, match=says): retrieve(model(), TOK, Hidden(), **{**dict(lengths=60, trials=2), **kw})


def test_prompts_that_do_not_fit_are_errors():
    class Hides(Hidden): prompt = lambda self, *a: Prompt([1, 2], [3], ['x'], dict(depth=1))
    with pytest.raises(PoseError, match='facts named depth'): retrieve(model(), TOK, Hides(), 60)
    class Long(Hidden): prompt = lambda self, tok, length, *a: super().prompt(tok, length + 1, *a)
    class Wordy(Hidden): prompt = lambda self, *a: Prompt([1, 2], [3] * 11, ['x'], {})
    with pytest.raises(PoseError, match='does not fit into 60'): retrieve(model(), TOK, Long(), 60)
    with pytest.raises(PoseError, match='use at least 11'): retrieve(model(), TOK, Wordy(), 60)
    broken = model(); broken.lm_head.weight.data[:] = float('nan')
    with pytest.raises(PoseError, match='not finite'): retrieve(broken, TOK, Hidden(), 60, trials=1)
