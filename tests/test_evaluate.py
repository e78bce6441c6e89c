"Evaluations are cut into pieces that are kept, belong to one model, and are compared honestly."
import json, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from scipy import stats

import pose_nb.evaluate as evaluate
from conftest import make_texts
from pose_nb.answers import wilson
from pose_nb.common import PoseError, read_json, write_json
from pose_nb.evaluate import AnswerTest, PerplexityTest, Pieces, Subject, eval_passkey, eval_ppl, mark_difference, measure, model_hash, newcombe
from pose_nb.harness import paired_interval
from pose_nb.retrieval import Passkey


@pytest.fixture
def model(checkpoint, tmp_path): return shutil.copytree(checkpoint(), tmp_path/'model')

@pytest.fixture
def other(checkpoint, tmp_path):
    out = shutil.copytree(checkpoint(), tmp_path/'other')
    write_json(out/'config.json', read_json(out/'config.json') | dict(rms_norm_eps=1e-3))
    return out


def test_a_fingerprint_is_of_what_decides_answers(model):
    before = model_hash(model)
    (model/'README.md').write_text('x'); (model/'eval').mkdir(); write_json(model/'pose_nb.json', {})
    assert model_hash(model) == before
    for name in ('config.json', 'tokenizer.json', 'model.safetensors'):
        kept = (model/name).read_bytes()
        (model/name).write_bytes(kept + b' ')
        assert model_hash(model) != before, name
        (model/name).write_bytes(kept)
    assert model_hash(model) == before
    (model/'model.safetensors').rename(model/'model2.safetensors')
    assert model_hash(model) != before


def test_pieces_are_found_by_everything_that_was_asked(tmp_path):
    p = Pieces(tmp_path)
    assert p.keep(dict(a=1), [(1, 2.5)]) == [[1, 2.5]] == p.find(dict(a=1))['value']
    assert p.find(dict(a=2)) is None and Pieces(None).find(dict(a=1)) is None and Pieces(None).keep(dict(a=1), [None]) == [None]
    assert p.keep(dict(b=1), None) is None and p.find(dict(b=1)) == dict(key=dict(b=1), value=None)      # nothing is a value too
    p.path(dict(a=1)).write_text('{')
    with pytest.raises(PoseError, match='not readable JSON'): p.find(dict(a=1))


def both_kinds(texts): return lambda s: [AnswerTest(Passkey(), (240, 260), (0., 1.), trials=3), PerplexityTest(tuple(texts), (64, 128), limit=3), PerplexityTest(tuple(texts), (64, 128), limit=2, last=20)]


def test_stopped_and_gone_on_equals_never_stopped(model, tmp_path, monkeypatch):
    tests, whole, ran = both_kinds(make_texts(4)), Pieces(tmp_path/'whole'), []
    want = measure(tests, [Subject(model)], whole, progress=False)
    real = Pieces.keep
    def until_the_fourth(self, key, value):
        ran.append(key)
        if len(ran) == 4: raise KeyboardInterrupt
        return real(self, key, value)
    monkeypatch.setattr(Pieces, 'keep', until_the_fourth)
    with pytest.raises(KeyboardInterrupt): measure(tests, [Subject(model)], Pieces(tmp_path/'part'), progress=False)
    monkeypatch.setattr(Pieces, 'keep', real)
    assert len(list((tmp_path/'part').iterdir())) == 3
    assert measure(tests, [Subject(model)], Pieces(tmp_path/'part'), progress=False) == want
    assert sorted(p.name for p in (tmp_path/'part').iterdir()) == sorted(p.name for p in (tmp_path/'whole').iterdir())
    for p in (tmp_path/'whole').iterdir(): assert p.read_bytes() == (tmp_path/'part'/p.name).read_bytes()


def test_finished_work_needs_no_model_and_other_settings_are_other_pieces(model, tmp_path):
    class Never(Subject): net = property(lambda self: pytest.fail('loaded'))
    pieces, tests = Pieces(tmp_path/'p'), both_kinds(make_texts(4))
    measure(tests, [Subject(model)], pieces, progress=False)
    measure(tests, [Never(model)], pieces, progress=False)
    for t in (AnswerTest(Passkey(), (240,), (0., 1.), trials=4), AnswerTest(Passkey(), (240,), (0., 1.), trials=3, seed=1), AnswerTest(Passkey(digits=5), (240,), (0., 1.), trials=3),
              AnswerTest(Passkey(), (240,), None, trials=3), PerplexityTest(tuple(make_texts(4)), (64, 128), stride=7, limit=1), PerplexityTest(tuple(make_texts(5, seed=1)), (64, 128), limit=1)):
        with pytest.raises(pytest.fail.Exception, match='loaded'): measure(lambda s: [t], [Never(model)], pieces, progress=False)


def test_pooled_documents_equal_documents_measured_together(model, tmp_path):
    from pose_nb.perplexity import context_perplexity, perplexity, tokenize_documents
    s, texts = Subject(model), make_texts(3)
    docs = tokenize_documents(texts, s.tokenizer)
    for t, r in ((PerplexityTest(tuple(texts), (64, 128)), perplexity(s.net, docs, (64, 128), progress=False)), (PerplexityTest(tuple(texts), (64, 128), last=9), context_perplexity(s.net, docs, (64, 128), 9, progress=False))):
        for row, want in zip(t.rows(measure(lambda _: [t], [s], Pieces(None), progress=False)[s.name][t.name]), r.rows, strict=True):
            assert row['ppl'] == pytest.approx(want.ppl, rel=1e-6) and (row['low'], row['high']) == pytest.approx(want.interval, rel=1e-5) and row['scored'] == want.scored


def test_newcombes_interval():
    for (a, n), (b, m) in (((56, 70), (48, 80)), ((9, 10), (3, 10)), ((0, 10), (10, 10)), ((10, 10), (10, 10))):
        d, low, high = mark_difference([1] * a + [0] * (n - a), [1] * b + [0] * (m - b), paired=False)
        assert d == pytest.approx(b / m - a / n) and -1 <= low <= d <= high <= 1 and low < high
    assert newcombe([1] * 48 + [0] * 32, [1] * 56 + [0] * 14) == pytest.approx((.0524, .3339), abs=1e-4)     # Newcombe 1998, table II (a), method 10


def test_which_interval_is_taken():
    assert mark_difference([1, 0, 1], [1, 1, 1])[1:] == paired_interval(np.array([1, 0, 1.]), np.ones(3))
    for a, b, paired in (([1, 0, 1], [1, 1, 1], False), ([1, .5, 1], [1, 1, 1], True)): assert mark_difference(a, b, paired)[1:] == newcombe(a, b)


@pytest.mark.parametrize('paired', [True, False])
def test_the_interval_of_a_difference_covers(paired):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        both = rng.random(30)                                          # the same questions: marks that go together
        a, b = (both < .5).astype(float), (np.where(rng.random(30) < .5, both, rng.random(30)) < .7).astype(float)
        _, low, high = mark_difference(a.tolist(), b.tolist(), paired)
        hits += low <= .2 <= high
    assert hits >= 370


def test_perplexities_of_other_tokens_are_not_compared():
    t, v = PerplexityTest((), (64,)), lambda scored, total: [dict(length=64, stride=32, bos=None, scored=scored, total=total)]
    assert t.differences([v(10, 5.)], [v(11, 5.)]) == []
    one, = t.differences([v(10, 5.), v(20, 9.)], [v(10, 6.), v(20, 10.)])
    assert one['ratio'] == pytest.approx(np.exp(2 / 30)) and one['base'] == pytest.approx(np.exp(14 / 30)) and one['low'] <= one['ratio'] <= one['high']
    assert t.differences([v(10, 5.)], [v(10, 6.)])[0]['clear'] is False      # one document says nothing about documents


def test_commands_write_compare_and_resume(model, other, cli, tmp_path):
    words = ('eval', 'passkey', model, '--compare', other, '--lengths', '240,260', '--trials', '2', '--depths', '0,100', '--json', '--no-progress')
    first = cli(*words); r = json.loads(first.out)
    assert first.code == 0 and [x['model'] for x in r['rows']] == ['model'] * 4 + ['other'] * 4 and [d['length'] for d in r['differences']] == [240, 260]
    assert r['models'] == dict(model=model_hash(model), other=model_hash(other)) and not (other/'eval').exists()
    assert {p.name for p in (model/'eval').iterdir()} == {'passkey.json', 'passkey.svg', 'pieces'}
    kept = {p: p.stat().st_mtime_ns for p in (model/'eval'/'pieces').iterdir()}
    assert json.loads(cli(*words).out)['rows'] == r['rows'] and {p: p.stat().st_mtime_ns for p in (model/'eval'/'pieces').iterdir()} == kept
    text = cli(*words[:-2], '--no-progress').out
    assert 'model compared with other' in text and 'Wilson' in text


def test_results_of_other_weights_are_refused(model, other, cli):
    assert cli('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--no-progress').code == 0
    shutil.copy(other/'config.json', model/'config.json')
    r = cli('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--no-progress')
    assert r.code == 2 and 'measured on another model' in r.err and '--output-dir' in r.err and 'Traceback' not in r.err


def test_a_model_is_not_compared_with_itself(model, other, cli, tmp_path):
    r = cli('eval', 'passkey', model, '--compare', model, '--lengths', '240', '--no-progress')
    assert r.code == 2 and 'same model' in r.err
    twin = shutil.copytree(other, tmp_path/'elsewhere'/'model')               # the same name, other weights
    r = cli('eval', 'passkey', model, '--compare', twin, '--lengths', '240', '--trials', '1', '--json', '--no-progress')
    assert r.code == 0 and len({x['model'] for x in json.loads(r.out)['rows']}) == 2, r.err


def test_nothing_is_written_beside_hub_models_or_the_embedded_one(model, monkeypatch):
    assert evaluate._folder('some/model', None) is None and evaluate._folder(evaluate.default_base(), None) is None and evaluate._folder(model, None) == model
    assert evaluate._folder('some/model', 'out') == 'out'


PROGRAM = '''
import sys
from pathlib import Path
from pose_nb.engines import leave
from pose_nb.evaluate import eval_passkey, eval_ppl
model, data, out = sys.argv[1:]
eval_passkey(model, lengths=[240, 260], trials=20, depths=[0, 100], output_dir=out, progress=False)
eval_ppl(model, data, lengths=[64, 128], documents=3, output_dir=out, progress=False)
leave(0)
'''

def test_two_processes_give_the_numbers_of_one(model, corpus, tmp_path):
    script = tmp_path/'program.py'; script.write_text(PROGRAM)
    for name, launch in (('one', [sys.executable]), ('two', [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(Path(__file__).parents[1]/'configs'/'accelerate'/'ddp.yaml')])):
        r = subprocess.run([*launch, script, model, corpus.jsonl, tmp_path/name], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
    files = sorted(p.relative_to(tmp_path/'one') for p in (tmp_path/'one').rglob('*.json'))
    assert len(files) == 2 + 2 + 3
    for f in files:
        a, b = (read_json(tmp_path/n/f) for n in ('one', 'two'))
        for x in (a, b): x.pop('environment', None)
        assert a == b, f
