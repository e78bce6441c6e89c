"Scales for groups of rotary pairs: contributions against a loop, choices against planted optima, tables that come back or are refused, runs that stop and go on."
import json, math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import pose_nb.dpe as dpe
from pose_nb.answers import retrieve
from pose_nb.cli import make_parser
from pose_nb.common import PoseError
from pose_nb.dpe import (PRESETS, Detection, undecided, best_scale, cell_score, check_table, contributions, detect, detect_scales, find_key_pairs, first_distance, keep_top, key_pairs,
                         find_dpe, load_dpe, load_table, attention_shape, plan_detection, preset, scales_plot)
from pose_nb.evaluate import Pieces, Subject
from pose_nb.needles import MultiNeedle
from pose_nb.relative import DPE, SelfExtend, relative
from pose_nb.retrieval import Passkey

torch.set_num_threads(1)
CONFIGS = dict(llama=LlamaConfig, mistral=MistralConfig, qwen2=Qwen2Config, qwen3=Qwen3Config, cohere=CohereConfig, glm=GlmConfig)
INTERLEAVED = ('cohere', 'glm')                                            # pair i is channels 2i, 2i+1; elsewhere i, i + half


def model(kind='llama', **kw):
    torch.manual_seed(0)
    more = dict(glm=dict(partial_rotary_factor=.5), mistral=dict(sliding_window=None)).get(kind, {})
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**{**dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                                                    max_position_embeddings=64, pad_token_id=None, bos_token_id=0, eos_token_id=1, initializer_range=.3), **more, **kw})).eval()


def docs(n=2, tokens=48, vocab=99):
    rng = np.random.default_rng(0)
    return [rng.integers(2, vocab, tokens) for _ in range(n)]


def channels(kind, pair, pairs): return [2 * pair, 2 * pair + 1] if kind in INTERLEAVED else [pair, pair + pairs]


# ---- key pairs

@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2', 'qwen3', 'cohere', 'glm'])
@pytest.mark.parametrize('pair', [0, 3])
def test_a_pair_made_large_is_the_top_pair(kind, pair):
    net = model(kind); shape = attention_shape(net)
    at = channels(kind, pair, shape['pairs'])
    with torch.no_grad():
        for layer in net.model.layers:
            for name in ('q', 'k'):
                norm = getattr(layer.self_attn, f'{name}_norm', None)
                if norm is not None: norm.weight[at] = 30.
                else:
                    proj = getattr(layer.self_attn, f'{name}_proj')
                    rows = torch.tensor([h * 16 + c for h in range(len(proj.weight) // 16) for c in at])
                    proj.weight[rows] *= 30
    assert key_pairs(net, docs(), 1) == (((pair,),) * 4,) * 2
    assert np.argmax(contributions(net, docs(), (48,)), -1).tolist() == [[pair] * 4] * 2


@pytest.mark.parametrize('ratio', [1, 2, 4, 7])
@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'cohere'])
def test_contributions_are_the_loop(kind, ratio):
    net, heads = model(kind, hidden_size=56, num_attention_heads=2 * ratio, num_key_value_heads=2), 2 * ratio
    seen, texts = [], docs(2, 24)
    for layer in net.model.layers:
        for name, h in (('q', heads), ('k', 2)):
            part = getattr(layer.self_attn, f'{name}_norm' if hasattr(layer.self_attn, f'{name}_norm') and kind == 'qwen3' else f'{name}_proj')
            part.register_forward_hook(lambda m, i, o, h=h: seen.append(o.detach().reshape(-1, h, 16)))
    want = np.zeros((2, heads, 8))
    for n in (12, 24):
        for d in texts:
            seen.clear()
            with torch.no_grad(): net(torch.from_numpy(d[:n])[None])
            for layer in range(2):
                q, k = seen[2 * layer], seen[2 * layer + 1]
                for h in range(heads):
                    for i in range(8):
                        c = channels(kind, i, 8)
                        want[layer, h, i] += np.mean([math.dist(q[t, h, c].tolist(), (0, 0)) * math.dist(k[t, h // ratio, c].tolist(), (0, 0)) for t in range(n)]) / 4
    got = contributions(net, texts, (12, 24))
    assert got.shape == (2, heads, 8) and got.dtype == np.float64 and np.allclose(got, want, rtol=1e-4)


def test_the_layout_does_not_matter():
    net, other = model('llama'), model('llama')
    swap = [1, 0, *range(2, 8)]                                              # pairs 0 and 1 change places, and with them their contributions
    place = torch.tensor(swap + [8 + i for i in swap])
    with torch.no_grad():
        for a, b in zip(net.model.layers, other.model.layers):
            for n, h in (('q_proj', 4), ('k_proj', 2)): getattr(b.self_attn, n).weight.copy_(getattr(a.self_attn, n).weight.view(h, 16, -1)[:, place].reshape(h * 16, -1))
    a, b = (contributions(m, docs(), (8,))[0] for m in (net, other))        # the first layer, whose input has no rotation in it
    assert np.allclose(a[:, swap], b, rtol=1e-5)


def test_reading_leaves_the_model_as_it_was():
    net, ids = model(), torch.from_numpy(docs(1)[0])[None]
    with torch.no_grad():
        before, how = net(ids).logits, net.config._attn_implementation
        contributions(net, docs(), (16,))
        assert net.config._attn_implementation == how and torch.equal(net(ids).logits, before)
    assert not any(hasattr(m, 'relative') for m in net.modules())
    with pytest.raises(IndexError): contributions(net, [np.full(16, 10**6)], (16,))
    assert net.config._attn_implementation == how and not any(hasattr(m, 'relative') for m in net.modules())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 12), st.data())
def test_exactly_top_pairs_are_kept(layers, heads, pairs, data):
    top, seed = data.draw(st.integers(1, pairs)), data.draw(st.integers(0, 99))
    c = np.random.default_rng(seed).integers(0, 4, (layers, heads, pairs)).astype(float)     # with ties
    keep = keep_top(c, top)
    assert len(keep) == layers and all(len(k) == heads for k in keep)
    for layer, kept in zip(c, keep):
        for row, k in zip(layer, kept):
            assert len(set(k)) == top and list(k) == sorted(k)
            out = [i for i in range(pairs) if i not in k]
            assert all((row[i], -i) > (row[j], -j) for i in k for j in out)
    rel = DPE((2,), 4, pairs, keep)
    assert [[int((g != 1).sum()) for g in rel._groups(l)] for l in range(layers)] == [[top] * heads] * layers


def test_key_pairs_change_what_they_should():
    net, ids = model(), torch.from_numpy(docs(1, 60)[0])[None]
    def logits(rel):
        with torch.no_grad(), relative(net, rel): return net(ids).logits
    everything = key_pairs(net, docs(), 8)
    assert torch.allclose(logits(DPE((4, 2), 8, 8, everything)), logits(DPE((4, 2), 8, 8)), atol=1e-5)
    assert torch.allclose(logits(DPE((4, 4), 8, 8)), logits(SelfExtend(4, 8)), atol=1e-5)
    assert not torch.allclose(logits(DPE((4, 4), 8, 8, key_pairs(net, docs(), 4))), logits(SelfExtend(4, 8)), atol=1e-3)


@pytest.mark.parametrize('how', ['sdpa', 'eager'])
def test_attention_and_scaling_do_not_matter(how):
    net, other = model(), model(rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1e4, original_max_position_embeddings=64), max_position_embeddings=512)
    net.set_attn_implementation(how)
    plain = contributions(net, docs(), (32,))
    assert np.allclose(plain[0], contributions(other, docs(), (32,))[0], rtol=1e-5)       # the first layer reads the same; YaRN's factor on cos and sin is no length of q and k
    assert np.allclose(plain, contributions(model(), docs(), (32,)), rtol=1e-4) and net.config._attn_implementation == how


def test_bad_key_pairs_are_refused():
    net = model()
    for call, words in ((lambda: key_pairs(net, [], 2), '0 documents'), (lambda: key_pairs(net, docs(2, 8), 2, (16,)), 'has 8 tokens'), (lambda: key_pairs(net, docs(), 9), 'has 8 pairs'),
                        (lambda: key_pairs(net, docs(), 0), 'at least 1'), (lambda: key_pairs(net, docs(), 2.5), 'whole number')):
        with pytest.raises(PoseError, match=words): call()


# ---- presets

def test_published_distances_and_the_conflict():
    readme, yaml = preset('llama3-8b-readme'), preset('llama3-8b-yaml')
    assert first_distance(readme, 131_072) == [33535, 33535, 66047, 9151, 5087, 5087, 9151, 2039]
    assert readme.scales == (4, 4, 2, 16, 32, 32, 16, 128) and yaml.scales == (2, 8, 2, 8, 32, 32, 32, 4) and PRESETS['llama3_8b_readme'].model == PRESETS['llama3_8b_yaml'].model
    whole = readme.distance(torch.tensor([131_071]), torch.arange(131_072))[0]
    assert whole.max(0).values[::8].tolist() == first_distance(readme, 131_072)
    for name, p in PRESETS.items():
        assert preset(name) == DPE(p.scales, 1024, 64) and p.source and len(p.scales) == 8 and p.top == 48


def test_presets_refuse_other_heads(checkpoint):
    fits = LlamaConfig(vocab_size=99, hidden_size=128, num_attention_heads=1, num_hidden_layers=1, intermediate_size=16)
    assert preset('qwen2.5-7b', AutoModelForCausalLM.from_config(fits)).pairs == 64
    for m in (model(), checkpoint()):
        with pytest.raises(PoseError, match='64 pairs, and this model.s have 8'): preset('qwen2.5_7b', m)
    with pytest.raises(PoseError, match='choose one of: llama3_8b_readme, llama3_8b_yaml, mistral'): preset('llama3')
    with pytest.raises(PoseError, match='transformers model|rotary'): attention_shape(torch.nn.Linear(2, 2))


# ---- choosing

def cell(mark=0., nll=1.): return dict(mark=mark, nll=nll)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 5), st.sampled_from(['mark', 'nll']))
def test_the_best_and_its_ties(values, k, criterion):
    candidates, others = (1, 2, 4, 8, 16, 32), 2**k
    best = best_scale([cell(v, -v) for v in values], candidates, others, criterion)
    equal = [s for s, v in zip(candidates, values) if v == max(values)]
    assert best in equal and all((abs(math.log2(best / others)), best) <= (abs(math.log2(s / others)), s) for s in equal)
    if len(equal) == 6: assert best == others                               # no evidence, no change


def test_undecided_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(30)                                                    # the questions differ more than the candidates
    asked = [[dict(mark=0, nll=h + d + .01 * rng.random()) for h in hard] for d in (.1, 0, .002)]
    assert undecided(asked, (1, 2, 4), 2, 'nll') == [2, 4] or undecided(asked, (1, 2, 4), 2, 'nll') == [2]
    assert 1 not in undecided(asked, (1, 2, 4), 2, 'nll') and undecided(asked, (1, 2, 4), 2, 'mark') == [1, 2, 4]
    right = [[dict(mark=float(i % 4 < k)) for i in range(40)] for k in (1, 3, 4)]
    assert undecided(right, (1, 2, 4), 4, 'mark') == [4]                       # of marks, less is worse
    assert undecided([a[:1] for a in asked], (1, 2, 4), 2, 'nll') == [1, 2, 4]      # one question tells nothing


def test_a_cell_is_summed_up():
    c = cell_score([dict(mark=m, nll=n) for m, n in ((1., .5), (0., 1.5), (1., 1.))])
    assert c['low'] < c['mark'] < c['high'] and (c['trials'], c['nll'], c['mark']) == (3, 1., pytest.approx(2 / 3))


# ---- plans

def stub(dim=128, length=8192): return SimpleNamespace(info=SimpleNamespace(dim=dim, length=length), tokenizer=None)


@pytest.fixture
def any_prompt(monkeypatch): monkeypatch.setattr('pose_nb.evaluate.AnswerTest.fit', lambda self, subject: (self, ''))


def test_published_settings_are_the_default(any_prompt):
    p = plan_detection(stub(), 131_072, MultiNeedle())
    assert (p.near, p.others, p.candidates, p.groups) == (1024, 32, (1, 2, 4, 8, 16, 32, 64, 128), 8)
    assert p.test.task.needles == 4 and p.test.lengths == (131_072,) and p.uniform == (32,) * 8
    assert p.scales(2, 4) == (32, 32, 4, 32, 32, 32, 32, 32) and len(p.cells()) == 8 * 7 + 1 == len(set(p.cells())) and p.cells()[0] == p.uniform


@settings(deadline=None, max_examples=60)
@given(st.integers(9, 15), st.integers(1, 6), st.integers(0, 200))
def test_default_settings_always_make_maps(log_window, log_factor, off):
    window, want = 2**log_window + off, 2**log_window * 2**log_factor + 3 * off
    p = Detection(None, 64, 8, 2 ** int(math.log2(window // 8)), (), 1)
    near, others = p.near, 2 ** max(0, round(math.log2(2 * want / window)))
    if others <= near:
        for s in {others, *(2**k for k in range(int(math.log2(max(1, min(near, want // near)))) + 1))}: DPE((s,), near, 64)


def test_bad_plans_are_refused(any_prompt):
    for kw, words in ((dict(target=8192), 'not longer'), (dict(groups=5), 'divides 64'), (dict(groups=0), 'at least 1'), (dict(near=9000), 'at most 8192'), (dict(near=1000), 'scale 16 does not divide near 1000'),
                      (dict(candidates=[3]), 'scale 3 does not divide'), (dict(candidates=[0]), 'at least 1'), (dict(others=3), 'scale 3'), (dict(criterion='accuracy'), 'choose one of: mark, nll'), (dict(trials=0), 'trials is 0'),
                      (dict(target='far'), 'whole number')):
        with pytest.raises(PoseError, match=words) as e: plan_detection(stub(), **dict(target=131_072, task=MultiNeedle()) | kw)
        assert '\n' not in str(e.value) and str(e.value).endswith('.')


# ---- detection

LONG = 700           # long enough for a passkey with the tests' tokenizer


@pytest.fixture(scope='session')
def subject(checkpoint): return Subject(checkpoint(max_position_embeddings=512))


def small(subject, **kw): return plan_detection(subject, **dict(target=LONG, task=Passkey(), groups=2, near=16, candidates=[2, 8], others=8, criterion='nll', trials=2) | kw)


def test_scores_are_what_retrieval_says(subject):
    t = detect_scales(subject, small(subject), progress=False)
    for g, row in enumerate(t.scores):
        for s, c in zip(t.candidates, row):
            scales = [8, 8]; scales[g] = s
            with relative(subject.net, DPE(scales, 16, 8)): r = retrieve(subject.net, subject.tokenizer, Passkey(), (LONG,), trials=2, bos=0, progress=False).rows[0]
            assert (c['mark'], c['nll'], c['trials']) == (r.accuracy, pytest.approx(r.nll, abs=1e-6), 2)
        assert t.scales[g] == t.candidates[int(np.argmin([c['nll'] for c in row]))] and t.scales[g] in t.undecided[g]
    assert t.uniform == t.scores[0][1] == t.scores[1][1] and (t.pairs, t.window, t.target, t.fingerprint) == (8, 512, LONG, subject.hash)
    assert t.rel() == DPE(tuple(t.scales), 16, 8)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=4, max_size=4), st.sampled_from(['mark', 'nll']))
def test_planted_scales_are_found(wanted, criterion):
    def ask(subject, plan, scales, keep, pieces, progress=None):
        off = sum(abs(math.log2(a / b)) for a, b in zip(scales, wanted))
        return [dict(mark=1 / (1 + off), nll=off + .1 * i) for i in range(3)], False
    fake = SimpleNamespace(info=SimpleNamespace(dim=32, length=256), name='m', hash='h', tokenizer=None)
    plan = Detection(SimpleNamespace(cost=1, lengths=(1024,), task=Passkey(), seed=0, bos=None), 16, 4, 32, (1, 2, 4, 8, 16), 8, criterion)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dpe, 'ask_cell', ask); m.setattr(dpe, 'attention_shape', lambda s: dict(layers=1, heads=1, pairs=16))
        t = detect_scales(fake, plan, progress=False)
    assert t.scales == wanted and t.together['nll'] == pytest.approx(.1)


def test_progress_has_a_time_to_go(subject, tmp_path, capsys):
    plan = small(subject)
    detect_scales(subject, plan, Pieces(tmp_path), progress=True)
    err = capsys.readouterr().err
    assert 'detect:' in err and '<' in err and 'tok/s' in err
    seen = {}
    class Bar(dpe.tqdm):
        def close(self): seen.setdefault(id(self), (self.total, self.n, self.initial)); kept.append(self); super().close()
    kept = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dpe, 'tqdm', Bar)
        detect_scales(subject, plan, Pieces(tmp_path), progress=True)
        next(tmp_path.iterdir()).unlink()
        detect_scales(subject, plan, Pieces(tmp_path), progress=True)
    bars, cells, cost = list(seen.values()), len(plan.cells()), plan.test.cost
    assert all(total == cost * (cells + 1) and n - initial in (0, cost) for total, n, initial in bars) and [b[1] - b[2] for b in bars] == [0, cost]


def test_the_choice_is_asked_with_its_key_pairs(subject):
    for candidates in ([2, 8], [8]):                                         # a choice that is no cell, and one that is
        keep = ((tuple(range(3)),) * 2,) * 2
        t = detect_scales(subject, small(subject, candidates=candidates), keep=keep, progress=False)
        with relative(subject.net, DPE(tuple(t.scales), 16, 8, keep)): r = retrieve(subject.net, subject.tokenizer, Passkey(), (LONG,), trials=2, bos=0, progress=False).rows[0]
        assert t.together['nll'] == pytest.approx(r.nll, abs=1e-6) and t.together['nll'] != pytest.approx(t.uniform['nll'], abs=1e-3) and t.keep == keep


class Impatient(Pieces):
    left = 0
    def keep(self, key, value):
        if not self.left: raise KeyboardInterrupt
        self.left -= 1
        return super().keep(key, value)


def test_stopped_anywhere_the_result_is_the_same(subject, tmp_path):
    plan = small(subject, candidates=[1, 2, 8])
    keep = find_key_pairs(subject, ['the sea and the wind ' * 300], 4, Pieces(tmp_path/'whole'))
    whole = detect_scales(subject, plan, Pieces(tmp_path/'whole'), keep, progress=False)
    total = len(list((tmp_path/'whole').iterdir()))
    assert total == 1 + 5 + 1                                                # norms, cells, the choice
    stops = 0
    for left in (0, 1, 2, 1, 1, 9):
        p = Impatient(tmp_path/'parts'); p.left = left
        try:
            k = find_key_pairs(subject, ['the sea and the wind ' * 300], 4, p)
            found = detect_scales(subject, plan, p, k, progress=False)
        except KeyboardInterrupt: stops += 1
    assert stops == 5 and found == whole
    read = lambda d: {p.name: p.read_bytes() for p in (tmp_path/d).iterdir()}
    assert read('parts') == read('whole')
    subject.drop()
    again = detect_scales(subject, plan, Pieces(tmp_path/'whole'), keep, progress=False)
    assert again == whole and subject._net is None                           # nothing is asked, no weight is loaded


def test_every_setting_has_pieces_of_its_own(subject, checkpoint, tmp_path):
    plan = small(subject)
    keys = [dpe._cell_key(subject, p, s, k) for p, s, k in ((plan, (8, 8), None), (plan, (8, 2), None), (plan, (8, 8), (((0,),),)), (small(subject, near=8), (8, 8), None), (small(subject, seed=1), (8, 8), None),
                                                            (small(subject, trials=3), (8, 8), None), (small(subject, target=LONG + 1), (8, 8), None), (small(subject, task=Passkey(digits=3)), (8, 8), None), (small(subject, bos=False), (8, 8), None))]
    keys.append(dpe._cell_key(Subject(checkpoint('mistral', max_position_embeddings=512)), plan, (8, 8), None))
    assert len({Pieces(tmp_path).path(k) for k in keys}) == len(keys)
    assert dpe._cell_key(subject, plan, (8, 8), None) == dpe._cell_key(subject, small(subject, criterion='mark', candidates=[4]), (8, 8), None)      # what does not change the answers does not ask again


def test_models_without_maps_are_refused_before_long(checkpoint):
    s = Subject(make_dynamic(checkpoint))
    with pytest.raises(PoseError, match='frequencies change'): detect_scales(s, small(s, target=1100), progress=False)


def make_dynamic(checkpoint): return checkpoint(max_position_embeddings=512, rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=2.))


# ---- the verb and its table

def words(folder, **kw): return dict(target=LONG, groups=2, near=16, candidates=[2, 8], others=8, task='passkey', criterion='nll', trials=2, output_dir=str(folder), progress=False) | kw


def test_the_verb_and_the_way_back(checkpoint, tmp_path):
    path = checkpoint(max_position_embeddings=512)
    r = detect(str(path), **words(tmp_path))
    assert (tmp_path/'dpe.json').exists() and (tmp_path/'dpe.svg').exists() and r['path'] == str(tmp_path/'dpe.json')
    t = load_table(tmp_path/'dpe.json')
    assert asdict(t) == r['table'] == json.loads((tmp_path/'dpe.json').read_text()) and str(t.scales[0]) in r['text'] and 'together' in r['text']
    before = (tmp_path/'dpe.json').read_bytes()
    assert detect(str(path), **words(tmp_path)) == r and (tmp_path/'dpe.json').read_bytes() == before
    for m in (path, Subject(path), Subject(path).net): assert load_dpe(r['path'], m) == DPE(tuple(t.scales), 16, 8)
    assert find_dpe(r['path'], path) == load_dpe(r['path']) and find_dpe('qwen2.5-7b') == preset('qwen2.5_7b')
    with pytest.raises(PoseError, match='does not exist'): find_dpe('none.json')
    with pytest.raises(PoseError, match='choose one of'): find_dpe('none')
    t.save(tmp_path/'copy.json')
    assert load_table(tmp_path/'copy.json') == t
    scales_plot(t); scales_plot(replace(t, criterion='mark'))


def test_the_verb_with_key_pairs(checkpoint, tmp_path):
    path, data = checkpoint(max_position_embeddings=512), tmp_path/'d.txt'
    data.write_text('the sea and the wind ' * 300)
    r = detect(str(path), **words(tmp_path, top=3, data=str(data)))
    rel = load_dpe(r['path'], path)
    assert np.shape(rel.keep) == (2, 2, 3) and '3 of 8 pairs' in r['text'] and hash(rel)
    with relative(Subject(path).net, rel) as net, torch.no_grad(): assert net(torch.arange(60)[None]).logits.isfinite().all()
    data.write_text('short')
    with pytest.raises(PoseError, match='no document fills'): detect(str(path), **words(tmp_path/'x', top=3, data=str(data)))


def test_the_default_task(checkpoint, tmp_path):
    data = tmp_path/'d.txt'
    data.write_text('the sea and the wind ' * 300)
    r = detect(str(checkpoint(max_position_embeddings=512)), **words(tmp_path, task='multi_needle', data=str(data), target=1100, candidates=[8], groups=1, needles=2))
    assert r['table']['protocol']['needles'] == 2 and r['table']['protocol']['task'] == 'multi_needle' and r['table']['scales'] == [8]


def test_tables_of_other_models_are_refused(checkpoint, tmp_path):
    path = checkpoint(max_position_embeddings=512)
    table = detect(str(path), **words(tmp_path))['path']
    same = checkpoint('llama', max_position_embeddings=512, rms_norm_eps=1e-5)             # other config, same shape
    for other, say in ((checkpoint(num_attention_heads=4), '4 heads and 4 pairs'), (checkpoint(num_hidden_layers=3), '3 layers'), (checkpoint(head_dim=32), '16 pairs'), (same, 'other weights')):
        with pytest.raises(PoseError, match=say) as e: load_dpe(table, other)
        assert '\n' not in str(e.value)
        with pytest.raises(PoseError, match='made for another model'): detect(str(other), **words(tmp_path))
    assert load_dpe(table, same, other_weights=True) == load_dpe(table)
    with pytest.raises(PoseError, match='3 layers'): load_dpe(table, checkpoint(num_hidden_layers=3), other_weights=True)
    with pytest.raises(PoseError, match='4 heads'): check_table(load_table(table), model())


def test_damaged_tables_are_refused(checkpoint, tmp_path):
    path = checkpoint(max_position_embeddings=512)
    good = detect(str(path), **words(tmp_path))['table']
    bad = tmp_path/'bad.json'
    wrong = [[], {}, 3, dict(scales=[2, 8]), {k: v for k, v in good.items() if k != 'seed'}, good | dict(extra=1), good | dict(scales='ab'), good | dict(scales=None), good | dict(scales=[3, 8]), good | dict(scales=[2]),
             good | dict(near='x'), good | dict(keep=[[[99], [0]], [[0], [0]]]), good | dict(keep=[[1]]), good | dict(keep=5), good | dict(pairs=7), good | dict(candidates=4)]
    for w in wrong:
        bad.write_text(json.dumps(w))
        with pytest.raises(PoseError, match='not a table of scales'): load_table(bad)
    bad.write_text('{')
    with pytest.raises(PoseError, match='not readable JSON'): load_table(bad)
    with pytest.raises(PoseError, match='does not exist'): load_table(tmp_path/'none.json')


def test_bad_words_are_refused(checkpoint, tmp_path):
    path = str(checkpoint(max_position_embeddings=512))
    for kw, say in ((dict(task='ppl'), 'choose one of: multi_needle, needle, passkey'), (dict(top=9), 'has 8 pairs'), (dict(top=0), 'at least 1'), (dict(target=512), 'not longer'), (dict(task='multi_needle', needles=9, target=600), 'too short'),
                    (dict(groups=3), 'divides 8'), (dict(task='multi_needle', needles=1.5), 'whole number')):
        with pytest.raises(PoseError, match=say): detect(path, **words(tmp_path, **kw))
    assert not list(tmp_path.iterdir())
    with pytest.raises(PoseError, match='no checkpoint folder'): detect(str(tmp_path/'none'), **words(tmp_path))
    from pose_nb.model import default_base
    with pytest.raises(PoseError, match='output-dir'): detect(default_base(), 1024, task='passkey')


def test_the_command_line_follows():
    args = vars(make_parser(detect, 'pose_nb detect').parse_args(['M', '--target', '128k', '--candidates', '1,2,4', '--criterion', 'nll', '--no-progress']))
    assert (args['model'], args['target'], args['candidates'], args['criterion'], args['progress'], args['task']) == ('M', 131_072, [1, 2, 4], 'nll', False, 'multi_needle')
