"Evaluations are cut into pieces that are kept, belong to one model, and are compared honestly."
import json, shutil, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np, pytest, torch
from scipy import stats

import pose_nb.evaluate as evaluate
from conftest import make_texts
from pose_nb.answers import wilson
from pose_nb.common import PoseError, read_json, write_json
from pose_nb.evaluate import AnswerTest, LongPPLTest, MarkTest, PerplexityTest, Pieces, ShortTest, Subject, eval_passkey, eval_ppl, mark_difference, run_pieces, model_hash, newcombe
from pose_nb.experiment import interval
from pose_nb.harness import paired_interval
from pose_nb.needles import Haystack, Lines, Needle
from pose_nb.relative import ReRoPE
from pose_nb.retrieval import Passkey
from pose_nb.ruler import Niah


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
    want = run_pieces(tests, [Subject(model)], whole, progress=False)
    real = Pieces.keep
    def until_the_fourth(self, key, value):
        ran.append(key)
        if len(ran) == 4: raise KeyboardInterrupt
        return real(self, key, value)
    monkeypatch.setattr(Pieces, 'keep', until_the_fourth)
    with pytest.raises(KeyboardInterrupt): run_pieces(tests, [Subject(model)], Pieces(tmp_path/'part'), progress=False)
    monkeypatch.setattr(Pieces, 'keep', real)
    assert len(list((tmp_path/'part').iterdir())) == 3
    assert run_pieces(tests, [Subject(model)], Pieces(tmp_path/'part'), progress=False) == want
    assert sorted(p.name for p in (tmp_path/'part').iterdir()) == sorted(p.name for p in (tmp_path/'whole').iterdir())
    for p in (tmp_path/'whole').iterdir(): assert p.read_bytes() == (tmp_path/'part'/p.name).read_bytes()


def test_finished_work_needs_no_model_and_other_settings_are_other_pieces(model, tmp_path):
    class Never(Subject): net = property(lambda self: pytest.fail('loaded'))
    pieces, tests = Pieces(tmp_path/'p'), both_kinds(make_texts(4))
    run_pieces(tests, [Subject(model)], pieces, progress=False)
    run_pieces(tests, [Never(model)], pieces, progress=False)
    for t in (AnswerTest(Passkey(), (240,), (0., 1.), trials=4), AnswerTest(Passkey(), (240,), (0., 1.), trials=3, seed=1), AnswerTest(Passkey(digits=5), (240,), (0., 1.), trials=3),
              AnswerTest(Passkey(), (240,), None, trials=3), PerplexityTest(tuple(make_texts(4)), (64, 128), stride=7, limit=1), PerplexityTest(tuple(make_texts(5, seed=1)), (64, 128), limit=1)):
        with pytest.raises(pytest.fail.Exception, match='loaded'): run_pieces(lambda s: [t], [Never(model)], pieces, progress=False)


def test_pooled_documents_equal_documents_measured_together(model, tmp_path):
    from pose_nb.perplexity import context_perplexity, perplexity, tokenize_documents
    s, texts = Subject(model), make_texts(3)
    docs = tokenize_documents(texts, s.tokenizer)
    for t, r in ((PerplexityTest(tuple(texts), (64, 128)), perplexity(s.net, docs, (64, 128), progress=False)), (PerplexityTest(tuple(texts), (64, 128), last=9), context_perplexity(s.net, docs, (64, 128), 9, progress=False))):
        for row, want in zip(t.rows(run_pieces(lambda _: [t], [s], Pieces(None), progress=False)[s.name][t.name]), r.rows, strict=True):
            assert row['ppl'] == pytest.approx(want.ppl, rel=1e-6) and (row['low'], row['high']) == pytest.approx(want.interval, rel=1e-5) and row['scored'] == want.scored


def test_the_gain_of_more_context_is_that_of_the_perplexity_page(model):
    from pose_nb.perplexity import context_gain, context_perplexity, tokenize_documents
    s, texts = Subject(model), make_texts(4, 200)
    t = PerplexityTest(tuple(texts), (32, 64, 128), last=9)
    short, *more = t.rows([p.run(s, False) for p in t.pieces(s)])
    r = context_perplexity(s.net, tokenize_documents(texts, s.tokenizer), (32, 64, 128), 9, bos=evaluate._bos(s, None), progress=False)
    assert short['gain'] is None
    for row, want in zip(more, context_gain(r), strict=True): assert row['gain'] == pytest.approx(want.gain, abs=1e-6) and (row['gain_low'], row['gain_high']) == pytest.approx(want.interval, abs=1e-6)


def test_newcombes_interval():
    for (a, n), (b, m) in (((56, 70), (48, 80)), ((9, 10), (3, 10)), ((0, 10), (10, 10)), ((10, 10), (10, 10))):
        d, low, high = mark_difference([1] * a + [0] * (n - a), [1] * b + [0] * (m - b), paired=False)
        assert d == pytest.approx(b / m - a / n) and -1 <= low <= d <= high <= 1 and low < high
    assert newcombe([1] * 48 + [0] * 32, [1] * 56 + [0] * 14) == pytest.approx((.0524, .3339), abs=1e-4)     # Newcombe 1998, table II (a), method 10


def test_which_interval_is_taken():
    assert mark_difference([1, 0, 1], [1, 1, 1])[1:] == paired_interval(np.array([1, 0, 1.]), np.ones(3))
    for a, b, paired in (([1, 0, 1], [1, 1, 1], False), ([1, .5, 1], [1, 1, 1], False), ([.5, .5, .5], [1, 1, 1], True)): assert mark_difference(a, b, paired)[1:] == newcombe(a, b)
    assert mark_difference([1, .5, .2], [1, 1, .4])[1:] == pytest.approx(interval([0, .5, .2])[1:]) and mark_difference([1, 0, .1], [0, 1, .9])[1:] == pytest.approx((max(-1, interval([-1, 1, .8])[1]), 1))


def test_depths_of_one_trial_are_one_question_in_differences():
    "Models that differ in which questions they know, and at no depth."
    rng, clear = np.random.default_rng(0), 0
    for _ in range(200):
        values = [[[dict(length=64, trial=t, depth=d, mark=float(x), nll=float(x), references=[str(t)], tokens=60) for d in range(5) for t, x in enumerate(known)]] for known in rng.random((2, 20)) < .6]
        row, = AnswerTest(Passkey(), (64,)).differences(*values)
        clear += row['clear']
        assert row['low'] <= row['difference'] <= row['high'] and row['nll'] == pytest.approx(row['difference'])
    assert clear <= 20, clear                                        # one in twenty; as a hundred independent trials it would be one in three


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
    t, v = PerplexityTest((), (64,)), lambda scored, total: [dict(length=64, stride=32, bos=None, scored=scored, total=total, document='x')]
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


def refused(cli, model, words, why, folder=None):
    r = cli('eval', *words[:1], model, *words[1:], '--no-progress')
    assert r.code == 2 and why in r.err and len(r.err.strip().splitlines()) == 1 and not r.out, (r.err, r.out)
    assert not (Path(folder or model)/'eval').exists()


@pytest.mark.parametrize('words, why', [
    ('passkey --lengths 99999999999999999999', 'use at most 100,000,000'), ('passkey --lengths 240 --trials 999999999999', 'use at most 1,000,000'),
    ('passkey --lengths 240 --depths 100,0', 'percentages from 0 (start) to 100 (end)'), ('passkey --lengths 240 --depths 0,101', 'percentages'), ('ppl --lengths 64 --last 0', 'last is 0'),
    ('all --lengths 240 --seed -1', 'seed is -1'), ('all --lengths 240 --seed 99999999999999999999999', 'below 2**64'), ('all --lengths 240 --tasks ppl,ppl', 'named twice'), ('all --lengths 240 --tasks ,', 'tasks is empty'),
    ('all --lengths 240 --threshold 2', 'from 0 to 1'), ('all --lengths 240 --threshold nan', 'from 0 to 1'), ('all --lengths 240 --tasks ppl --evaluator /no/such', 'no checkpoint folder'),
    ('all --lengths 240 --tasks ppl --file /no/such', 'is not a file here'), ('ruler --lengths 900 --tasks vt,VT', 'named twice'), ('ruler --lengths 900 --tasks vt --threshold -1', 'from 0 to 1'),
    ('ruler --lengths 900 --tasks vt --file /no/such', 'is not a file here'), ('longppl --evaluator /no/such', 'no checkpoint folder')])
def test_what_cannot_be_asked_is_refused_before_anything_is_measured(model, corpus, cli, words, why):
    words = words.split()
    refused(cli, model, words + (['--data', corpus.jsonl] if words[0] in ('ppl', 'all') else []), why)


def test_an_empty_text_is_not_taken_for_no_text(model, cli):
    for option in ('--output-dir', '--compare', '--tasks', '--data'): refused(cli, model, ['all', '--lengths', '240', option, ''], f'{option}: the text is empty')


def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_measured(model, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, 'load_model', lambda *_, **__: pytest.fail('loaded'))
    (tmp_path/'file').write_text('x')
    refused(cli, model, ['passkey', '--lengths', '240', '--output-dir', tmp_path/'file'], 'is a file; name another folder with --output-dir')
    monkeypatch.setattr(evaluate.os, 'access', lambda *_: False)
    refused(cli, model, ['passkey', '--lengths', '240'], 'is not writable')


def test_a_second_model_without_tokenizer_and_the_model_of_longppl_are_looked_at_first(model, other, corpus, cli, monkeypatch):
    monkeypatch.setattr(evaluate, 'load_model', lambda *_, **__: pytest.fail('loaded'))
    for p in other.glob('*token*'): p.unlink()
    refused(cli, model, ['passkey', '--lengths', '240', '--compare', other], 'no tokenizer')
    refused(cli, other, ['longppl', '--evaluator', model, '--data', corpus.jsonl, '--context', '64'], 'no tokenizer')
    refused(cli, model.parent/'none', ['kv', '--pairs', '3'], 'no checkpoint folder')


def test_damaged_pieces_and_foreign_files_are_one_sentence(model, cli):
    words = ('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--no-progress')
    assert cli(*words).code == 0
    piece, = (model/'eval'/'pieces').iterdir()
    for text in ('[]', '5', '{"value": 1}', '{"key":', ''):
        piece.write_text(text); r = cli(*words)
        assert r.code == 2 and 'delete it' in r.err and len(r.err.splitlines()) == 1, r.err
    piece.unlink(); (model/'eval'/'mine.json').write_text('[1]')
    r = cli(*words); assert r.code == 2 and 'not a result of an evaluation' in r.err
    (model/'eval'/'mine.json').write_text('{"models": [1]}')
    r = cli(*words); assert r.code == 2 and 'not a result of an evaluation' in r.err


def test_what_a_killed_run_had_begun_to_write_is_swept(model, cli):
    import os, time
    (model/'eval'/'pieces').mkdir(parents=True)
    old, new = model/'eval'/'.all.json.abcdefgh', model/'eval'/'pieces'/'.x.json.abcdefgh'
    for p in (old, new): p.write_text('{')
    os.utime(old, (time.time() - 100,) * 2)
    assert cli('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--no-progress').code == 0
    assert not old.exists() and new.exists()         # another run may be writing that one


def test_equal_numbers_of_other_tokens_are_not_compared(checkpoint, tmp_path, corpus, cli):
    a, b = shutil.copytree(checkpoint(), tmp_path/'a'), shutil.copytree(checkpoint(bos=True, rms_norm_eps=1e-3), tmp_path/'b')
    from conftest import make_tokenizer
    make_tokenizer(vocab=290).save_pretrained(b)
    for extra in (('--max-tokens', '100'), ('--last', '20')):
        r = cli('eval', 'ppl', a, '--compare', b, '--data', corpus.jsonl, '--lengths', '64', '--documents', '3', *extra, '--no-progress')
        assert r.code == 0 and 'read different tokens' in r.out, (r.out, r.err)
    r = json.loads(cli('eval', 'all', a, '--compare', b, '--data', corpus.jsonl, '--lengths', '64', '--documents', '3', '--max-tokens', '100', '--tasks', 'ppl', '--no-progress', '--json').out)
    assert r['differences'] == [] and 'not compared, because the models read different tokens: ppl' in r['text']


def test_all_leaves_out_what_does_not_fit_and_says_so(model, other, corpus, cli):
    words = ('eval', 'all', model, '--data', corpus.jsonl, '--documents', '2', '--trials', '30', '--json', '--no-progress')
    r = json.loads(cli(*words, '--tasks', 'ppl,lines', '--lengths', '64,555,700', '--max-tokens', '100').out)['left_out']     # some of thirty prompts of 555 tokens do not fit
    assert r['ppl'].startswith('only at 64:') and 'max_tokens' in r['ppl'] and r['lines'].startswith('only at 700:')
    r = json.loads(cli(*words, '--tasks', 'ppl', '--lengths', '64', '--evaluator', other).out)
    assert 'short context' in r['left_out']['longppl'] and [x['test'] for x in r['rows']] == ['ppl']


def test_the_second_models_tokenizer_counts_too(checkpoint, tmp_path, corpus, cli):
    a, b = checkpoint(), shutil.copytree(checkpoint(), tmp_path/'b')
    from conftest import make_tokenizer
    make_tokenizer(vocab=260).save_pretrained(b)                     # smaller pieces: the same prompt is longer
    need = lambda m: int(cli('eval', 'passkey', m, '--lengths', '20', '--output-dir', tmp_path/'x').err.split('at least ')[1].rstrip('.\n'))
    assert need(a) < need(b)
    r = cli('eval', 'all', a, '--compare', b, '--data', corpus.jsonl, '--lengths', f'{need(a)},{need(b)}', '--tasks', 'passkey', '--trials', '2', '--output-dir', tmp_path/'out', '--json', '--no-progress')
    assert r.code == 0 and json.loads(r.out)['left_out']['passkey'].startswith(f'only at {need(b)}:'), r.err


def test_an_interruption_says_what_was_kept(model, cli, monkeypatch):
    real, ran = Pieces.keep, []
    def keep(self, key, value):
        if ran: raise KeyboardInterrupt
        ran.append(1); return real(self, key, value)
    monkeypatch.setattr(Pieces, 'keep', keep)
    r = cli('eval', 'passkey', model, '--lengths', '240,260', '--trials', '1', '--no-progress')
    assert r.code == 130 and 'what was measured is kept; the same command goes on' in r.err
    shutil.rmtree(model/'eval')
    r = cli('eval', 'passkey', model, '--lengths', '240,260', '--trials', '1', '--no-progress')
    assert r.code == 130 and 'nothing was saved' in r.err
    ran.clear()
    r = cli('detect', model, '--target', '300', '--task', 'passkey', '--groups', '2', '--candidates', '1,2', '--trials', '1', '--no-progress')
    assert r.code == 130 and 'what was measured is kept; the same command goes on' in r.err


def test_shots_and_tokenizers_that_the_harness_cannot_use(model, tmp_path, cli):
    pytest.importorskip('lm_eval')
    from conftest import make_tokenizer
    from pose_nb.harness import write_task
    q = [dict(question=f'the sea {i}', choices=['wind', 'stone'], answer=i % 2) for i in range(4)]
    write_task(tmp_path/'tasks', 'mine', q, q[:3])
    words = ['short', '--tasks', 'mine', '--include-path', tmp_path/'tasks']
    refused(cli, model, words + ['--shots', '4'], "has 3 examples")
    assert cli('eval', *words[:1], model, *words[1:], '--shots', '3', '--output-dir', tmp_path/'out', '--no-progress').code == 0
    everything = ['all', '--tasks', 'passkey', '--lengths', '240', '--trials', '1', '--include-path', tmp_path/'tasks']
    r = cli('eval', *everything[:1], model, *everything[1:], '--short', 'mine', '--output-dir', tmp_path/'all', '--no-progress')
    assert r.code == 0 and (tmp_path/'all'/'eval'/'short.json').exists(), r.err
    refused(cli, model, everything, 'add --short')
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(False).backend_tokenizer).save_pretrained(model)
    refused(cli, model, words, 'neither a BOS nor an EOS token')


def test_a_loss_beyond_any_perplexity_is_one_sentence(checkpoint, corpus, tmp_path, cli):
    from safetensors.torch import load_file, save_file
    base = shutil.copytree(checkpoint(), tmp_path/'broken')
    w = load_file(base/'model.safetensors'); w['lm_head.weight'] *= 1e4
    save_file(w, base/'model.safetensors', dict(format='pt'))
    r = cli('eval', 'ppl', base, '--data', corpus.jsonl, '--lengths', '64', '--documents', '2', '--no-progress')
    assert r.code == 2 and 'beyond any perplexity' in r.err and not (base/'eval'/'ppl.json').exists(), r.err
    t, v = PerplexityTest((), (64,)), lambda total: [[dict(length=64, stride=32, bos=None, scored=1, total=x, document='x')] for x in total]
    assert t.rows(v([1., 500.]))[0]['high'] < float('inf') > t.differences(v([1., 1.]), v([2., 600.]))[0]['high']      # an interval may reach further


def test_a_foreign_record_and_unknown_attention_are_one_sentence(model, cli):
    words = ('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--no-progress')
    r = cli(*words, '--attn-implementation', 'foo'); assert r.code == 2 and "attention code 'foo' is unknown" in r.err and 'damaged' not in r.err
    (model/'pose_nb.json').write_text('[1]')
    r = cli(*words); assert r.code == 2 and 'not a record of a run' in r.err and not (model/'eval').exists()


VERBS = [('needle', ['--distractors', '2', '--lengths', '300'], 'needle'), ('needle', ['--needles', '3', '--criterion', 'any', '--lengths', '400'], 'multi_needle'), ('lines', ['--lengths', '700', '--number', 'last'], 'lines'),
         ('kv', ['--pairs', '3'], 'key_value'), ('kv', ['--lengths', '900'], 'key_value'), ('ruler', ['--tasks', 'niah_single_2,vt', '--lengths', '2k'], 'ruler')]

@pytest.mark.parametrize('verb,words,name', VERBS, ids=lambda x: ' '.join(x) if isinstance(x, list) else x)
def test_every_retrieval_verb(model, cli, corpus, verb, words, name):
    data = ['--data', corpus.jsonl] if verb == 'needle' else []
    r = cli('eval', verb, model, *words, *data, '--trials', '2', '--json', '--no-progress')
    assert r.code == 0, r.err
    out = json.loads(r.out)
    assert out['name'] == name and (model/'eval'/f'{name}.json').exists() and (model/'eval'/f'{name}.svg').exists() and out['rows']
    if verb == 'ruler': assert {x['test'] for x in out['rows']} == {'niah_single_2', 'vt', 'RULER average of 2'} and (model/'eval'/'vt.json').exists()


def test_a_relative_map_is_another_measurement_of_the_same_model(model, cli):
    words = ('eval', 'passkey', model, '--lengths', '240,260', '--trials', '3', '--json', '--no-progress')
    plain, mapped = json.loads(cli(*words).out), json.loads(cli(*words, '--relative', 'rerope', '--relative-kwargs', '{"window": 8}', '--compare', model).out)
    assert mapped['name'] == 'passkey-rerope' and mapped['title'].endswith('rerope (window 8)') and list(mapped['models']) == ['model+rerope', 'model']
    assert [r['nll'] for r in mapped['rows'][2:]] == [r['nll'] for r in plain['rows']] != [r['nll'] for r in mapped['rows'][:2]] and len(mapped['differences']) == 2
    assert {p.name for p in (model/'eval').glob('*.json')} == {'passkey.json', 'passkey-rerope.json'}


@pytest.mark.parametrize('words,says', [(['--relative', 'rerop'], 'unknown relative map'), (['--relative', 'self_extend', '--relative-kwargs', '{"group": 2, "window": 32}'], 'reaches 96 tokens'), (['--relative-kwargs', '{"group": 2}'], 'name it with --relative'),
                                        (['--relative', 'rerope', '--relative-kwargs', '{"grup": 2}'], "no setting 'grup'"), (['--relative', 'dpe'], 'dpe needs its scales'), (['--relative', 'dpe', '--relative-kwargs', '{"source": "llama3-8b-readme"}'], 'pairs')])
def test_maps_that_cannot_be(model, cli, words, says):
    r = cli('eval', 'passkey', model, '--lengths', '240', '--no-progress', *words)
    assert r.code == 2 and says in r.err and 'Traceback' not in r.err and not (model/'eval').exists()


def test_generate_writes_what_the_model_would(model, cli, tmp_path):
    (tmp_path/'p.txt').write_text(make_texts(1, 60)[0])
    one, two = (json.loads(cli('generate', model, '--prompt-file', tmp_path/'p.txt', '--max-new-tokens', '5', '--json', *w).out) for w in ([], ['--relative', 'rerope', '--relative-kwargs', '{"window": 8}', '--chunk', '7']))
    s = Subject(model); ids = s.tokenizer((tmp_path/'p.txt').read_text(), return_tensors='pt')['input_ids']
    with torch.inference_mode():
        for _ in range(5): ids = torch.cat([ids, s.net(ids).logits[:, -1:].argmax(-1)], 1)
    assert one['text'] == s.tokenizer.decode(ids[0, -5:], skip_special_tokens=True) and one['new_tokens'] == 5 and two['relative'] == dict(name='rerope', window=8, log_n=None) and two['text'] != one['text']
    for words, says in (([], 'either --prompt-file or --prompt'), (['--prompt-file', 'no.txt'], 'no.txt'), (['--prompt', 'a', '--temperature', '-1'], 'temperature'), (['--prompt', 'a', '--max-new-tokens', '0'], 'max_new_tokens')):
        r = cli('generate', model, *words)
        assert r.code == 2 and says in r.err and 'Traceback' not in r.err


def test_generate_takes_the_scales_that_detect_found(model, other, cli, tmp_path):
    how = ('--groups', '2', '--candidates', '1,2', '--trials', '1', '--no-progress')
    r = cli('detect', model, '--target', '300', '--task', 'passkey', '--output-dir', tmp_path/'found', *how)
    assert r.code == 0, r.err
    table = json.dumps(dict(source=str(tmp_path/'found'/'dpe.json')))
    words = ('--prompt', 'the sea', '--max-new-tokens', '4', '--json', '--relative')
    def said(r):
        assert r.code == 0, r.err
        return json.loads(r.out)
    one, two = (said(cli('generate', model, *words, 'DPE', '--relative-kwargs', k))['relative'] for k in (table, '{"scales": [1, 2], "pairs": 8, "window": 8}'))
    assert one['name'] == two['name'] == 'dpe' and len(one['scales']) == 2 and one['pairs'] == 8
    report = said(cli('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--relative', 'DPE', '--relative-kwargs', table, '--json', '--no-progress'))
    assert report['name'] == 'passkey-dpe' and list(report['models']) == ['model+dpe'] and report['relative']['scales'] == one['scales']
    for words_, says in (([other, *words, 'dpe', '--relative-kwargs', table], 'other_weights'), ([model, *words, 'dpe', '--relative-kwargs', table[:-1] + ', "window": 7}'], "'window' too"),
                         ([model, *words, 'dpe', '--relative-kwargs', '{"source": 5}'], 'source is 5'), ([model, *words, 'leaky_rerope', '--relative-kwargs', '{"factor": "x"}'], "factor is 'x'"),
                         ([model, *words, 'string', '--relative-kwargs', '{"attention_factor": "x"}'], "attention_factor is 'x'"), ([model, *words, 'dpe', '--relative-kwargs', '{"scales": 4, "pairs": 8}'], 'scales are 4')):
        r = cli('generate', *words_)
        assert r.code == 2 and says in r.err and 'Traceback' not in r.err, (says, r.err)
    assert cli('generate', other, *words, 'dpe', '--relative-kwargs', table[:-1] + ', "other_weights": true}').code == 0


def test_generate_refuses_before_the_weights_are_read(model, cli, tmp_path, monkeypatch):
    (tmp_path/'p.txt').write_bytes(b'\xff\xfe')
    monkeypatch.setattr('pose_nb.relative.load_model', lambda *a, **kw: pytest.fail('the weights were read'))
    for words, says in ((['--prompt-file', tmp_path/'p.txt'], 'not text in UTF-8'), (['--prompt', 'a', '--relative', 'rerop'], 'unknown relative map'), (['--prompt', 'a', '--chunk', '0'], 'chunk'),
                        (['--prompt', 'a', '--relative', 'self_extend', '--max-new-tokens', '100k'], 'or lengths up to')):
        r = cli('generate', model, *words)
        assert r.code == 2 and says in r.err and 'Traceback' not in r.err, (says, r.err)


def test_generate_under_a_map_does_not_take_a_fixed_cache(model, cli):
    config = json.loads((model/'generation_config.json').read_text()) if (model/'generation_config.json').exists() else {}
    (model/'generation_config.json').write_text(json.dumps(config | dict(cache_implementation='static')))
    r = cli('generate', model, '--prompt', 'the sea', '--max-new-tokens', '4', '--relative', 'rerope')
    assert r.code == 0, r.err


def test_the_card_has_every_result_and_every_difference(cli, checkpoint, tmp_path):
    out = tmp_path/'long'
    assert cli('patch', checkpoint(), '--target', '256', '--output-dir', out).code == 0
    assert cli('eval', 'all', out, '--tasks', 'passkey,needle', '--lengths', '300,320', '--trials', '2', '--compare', checkpoint(), '--no-progress').code == 0
    card = (out/'README.md').read_text()
    assert all(f'### {t}' in card for t in ('Overview', 'Passkey retrieval', 'Retrieval: needle')) and card.count('long compared with base') == 2 and '| length | base | model | difference | low | high | clear |' in card


# ---------------------------------------------------------------------------------------------- what a piece is found by

def changed(test, **others):
    "The key of a test, and the keys with each field changed."
    cut = {'documents', 'limit'} if isinstance(test, PerplexityTest) else set()              # these choose the pieces, whose tokens are in their keys
    assert set(others) == {f.name for f in fields(test)} - cut
    return [json.dumps(t.key(), sort_keys=True) for t in (test, *(replace(test, **{k: v}) for k, v in others.items()))]


def test_every_setting_is_part_of_what_was_asked(model, tmp_path, monkeypatch):
    pytest.importorskip('lm_eval')
    long = 'one two three. ' * 40
    keys = [changed(AnswerTest(Passkey(), (240,)), task=Passkey(digits=5), lengths=(250,), depths=(0.,), trials=3, seed=1, bos=True),
            changed(PerplexityTest((), (64,), ids=np.arange(99)), lengths=(65,), stride=3, max_tokens=70, bos=True, last=5, truncated=True, ids=np.arange(1, 100)),
            changed(MarkTest(('a',)), texts=('b',), context=9, step=9, max_tokens=9), changed(LongPPLTest(dict(a=1)), marks=dict(a=2)),
            changed(ShortTest(('a',)), tasks=('b',), shots=1, limit=2, include_path=str(tmp_path), truncate=True, bos=False, seed=1, batch_size=2),
            [json.dumps(AnswerTest(t, (2048,)).key(), sort_keys=True) for t in (Niah(text=long), Niah(text=long.replace('two', 'six')), Needle(haystack=Haystack((long,))), Needle(haystack=Haystack((long[:-2] + '! ',))))]]
    keys.append([json.dumps(PerplexityTest((), (64,), ids=np.arange(99), last=n).key(), sort_keys=True) for n in (5, 6)])
    for ks in keys: assert len(set(ks)) == len(ks)
    subject = lambda **kw: json.dumps(Subject(model, **kw).key(), sort_keys=True)
    a, b = subject(), subject(attn_implementation='eager')
    mapped = Subject(model, relative='rerope'); mapped.rel = ReRoPE(8)
    monkeypatch.setattr(evaluate, '_versions', lambda: dict(code='other'))
    assert len({a, b, json.dumps(mapped.key(), sort_keys=True), subject()}) == 4


def test_versions_know_this_packages_own_code(tmp_path, monkeypatch):
    before = evaluate._versions()
    assert {'python', 'torch', 'transformers', 'code'} <= before.keys() and 'hardware' not in before
    copy = shutil.copytree(Path(evaluate.pose_nb.__file__).parent, tmp_path/'pose_nb', ignore=shutil.ignore_patterns('__pycache__'))
    (copy/'needles.py').write_text((copy/'needles.py').read_text().replace('amber', 'azure').replace('acorn', 'acre'))
    monkeypatch.setattr(evaluate.pose_nb, '__file__', str(copy/'__init__.py'))
    evaluate._versions.cache_clear()
    try: assert {k for k, v in evaluate._versions().items() if v != before[k]} == {'code'}
    finally: evaluate._versions.cache_clear()


def test_code_and_tokenizer_files_of_a_checkpoint_are_part_of_its_fingerprint(model):
    seen = {model_hash(model)}
    for name in ('modeling_own.py', 'spiece.model', 'own.tiktoken', 'tekken.json'): (model/name).write_text('x'); seen.add(model_hash(model))
    assert len(seen) == 5


def test_data_that_own_tasks_name_are_part_of_what_was_asked(tmp_path):
    pytest.importorskip('lm_eval')
    data, tasks = tmp_path/'data.json', tmp_path/'tasks'
    tasks.mkdir(); data.write_text('[1]'); (tasks/'t.yaml').write_text(f"task: t\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: '{data}'}}\n")
    keys = [ShortTest(('t',), include_path=str(tasks)).key()]
    data.write_text('[2]'); keys.append(ShortTest(('t',), include_path=str(tasks)).key())
    assert keys[0] != keys[1] and len(keys[1]['data']) == 1


# ---------------------------------------------------------------------------------------------- reports say what was measured

def trial(t, mark, n=64, **kw): return dict(length=n, depth=None, trial=t, mark=float(mark), nll=1. - mark, probability=float(mark), forced=mark == 1, references=[str(t)], reply='', tokens=60) | kw


def test_a_report_keeps_base_and_model_apart(tmp_path):
    r = evaluate.report(AnswerTest(Passkey(), (64,)), dict(mine=[[trial(t, 1) for t in range(9)]], base=[[trial(t, t == 0) for t in range(9)]]), dict(mine='m', base='b'), tmp_path)
    d, = r['differences']
    assert d['base'] == pytest.approx(1 / 9) and d['model'] == 1 and d['difference'] == pytest.approx(8 / 9) and d['clear'] and d['nll'] == pytest.approx(-8 / 9) and d['nll_high'] < 0
    assert 'mine compared with base' in r['text'] and [x['model'] for x in r['rows']] == ['mine', 'base'] and read_json(tmp_path/'eval'/'passkey.json')['differences'] == [d]


def test_lengths_beyond_what_a_model_claims_are_said_to_be(model, cli):
    claims = Subject(model).info.length
    text = cli('eval', 'passkey', model, '--lengths', f'240,{claims + 100},{claims + 200}' if claims > 240 else '240,260', '--trials', '1', '--no-progress').out
    assert f'model claims {claims:,} tokens; ' in text and ' are beyond that.' in text
    assert 'claims' not in cli('eval', 'passkey', model, '--lengths', '240', '--trials', '1', '--relative', 'rerope', '--no-progress').out


def test_questions_that_differ_are_not_paired():
    a, b = [[trial(t, t % 2) for t in range(8)]], [[trial(t, t % 2 or t == 0, references=['else']) for t in range(8)]]
    d, = AnswerTest(Passkey(), (64,)).differences(a, b)
    assert (d['difference'], d['low'], d['high']) == mark_difference([t['mark'] for t in a[0]], [t['mark'] for t in b[0]], False) and d['nll'] is None


def test_one_document_has_no_interval(model, other, corpus, cli, tmp_path):
    out = json.loads(cli('eval', 'ppl', model, '--compare', other, '--data', corpus.jsonl, '--lengths', '64', '--documents', '1', '--output-dir', tmp_path/'out', '--json', '--no-progress').out)
    assert all(r['low'] is None and r['high'] is None and r['documents'] == 1 for r in out['rows']) and all(d['low'] is None and not d['clear'] for d in out['differences'])
    r = cli('eval', 'ppl', model, '--data', corpus.jsonl, '--lengths', '64', '--documents', '1', '--no-progress')
    assert r.code == 0 and 'None' not in r.out and (model/'eval'/'ppl.svg').exists()
    values = [[[dict(length=64, stride=32, bos=None, scored=9, total=9 * x, document=str(i)) for _ in '1'] for i, x in enumerate((.1, 3.))]]
    assert PerplexityTest((), (64,)).rows(values[0])[0]['low'] == 1                      # a perplexity is at least 1


def test_reach_stops_at_the_threshold_and_at_what_was_not_asked():
    cells = lambda test, **at: dict(test=test, name=test, rows=[dict(model='m', length=int(n[1:]), accuracy=a) for n, a in at.items()], differences=[])
    row = lambda threshold, *reports: evaluate.overview(list(reports), threshold)[-1]
    assert [row(t, cells('passkey', n256=.9, n512=.6))['reach'] for t in (.95, .7, .5)] == [0, 256, 512]
    assert row(.5, cells('passkey', n512=.6), cells('lines', n256=.9, n512=.9))['reach'] == 512
    vt, cwe = cells('vt', n256=.9, n512=.1, n1024=.9), cells('cwe', n256=.9, n1024=.9)                 # cwe could not be asked at 512
    got = row(.5, vt, cwe)
    assert got['test'] == 'RULER average of 2' and got['256'] == .9 and got['512'] == '' and got['1024'] == .9 and got['reach'] == 256
    assert row(.5, cells('lines', n512=.9), cells('vt', n256=.9, n512=.9))['reach'] == 512             # too short a text to ask is none that failed


def test_longppl_over_other_tokens_is_not_compared():
    v = lambda tokens: [dict(longppl=2., per_document=[dict(tokens=tokens, keys=2, key_nll=.5), dict(tokens=9, keys=3, key_nll=.7)])]
    assert LongPPLTest({}).differences(v(8), v(7)) == [] and len(LongPPLTest({}).differences(v(8), v(8))) == 1


def test_pieces_are_whole_and_limited(model):
    s, texts = Subject(model), tuple(make_texts(3, 200))
    assert len(PerplexityTest(texts, (64,)).pieces(s)) == 3 and len(PerplexityTest(texts, (64,), limit=2).pieces(s)) == 2
    assert [p.texts for p in MarkTest(texts, 16, 8).pieces(s)] == [(t,) for t in texts]
    with pytest.raises(PoseError, match='no document has'): PerplexityTest(texts, (10**6,)).pieces(s)
    assert evaluate._check_asked(3, [0, 24.5, 100], 0) == (0, .245, 1)
    n = len(evaluate.tokenize_documents([texts[0]], s.tokenizer)[0])
    assert len(PerplexityTest(texts[:1], (n + 1,), bos=True).pieces(s)) == 1                             # BOS fills a place
    with pytest.raises(PoseError, match='no document has'): PerplexityTest(texts[:1], (n + 1,), bos=False).pieces(s)


@pytest.mark.parametrize('test,says', [(lambda x: PerplexityTest(x, (64,), stride=65), 'stride 65'), (lambda x: PerplexityTest(x, (64,), stride=0), 'stride'), (lambda x: PerplexityTest(x, (64,), max_tokens=9), 'max_tokens 9'),
                                       (lambda x: PerplexityTest(x, (64,), last=64), 'cannot hold 64'), (lambda x: AnswerTest(Passkey(), (20,)), 'at least'), (lambda x: AnswerTest(Lines(), (64,)), 'too short'),
                                       (lambda x: MarkTest(x, 10**6), 'longer than the short context')])
def test_what_cannot_be_asked_is_refused_before_the_weights_are_read(model, test, says):
    class Never(Subject): net = property(lambda self: pytest.fail('loaded'))
    with pytest.raises(PoseError, match=says): run_pieces(lambda s: [AnswerTest(Passkey(), (240,)), test(tuple(make_texts(2, 200)))], [Never(model)], Pieces(None), progress=False)


def test_costs_are_tokens_to_read():
    ids = np.zeros(1000, np.int64)
    assert PerplexityTest((), (100,), ids=ids).cost == 100 * 19 and PerplexityTest((), (100,), ids=ids, max_tokens=300, stride=100).cost == 300
    assert PerplexityTest((), (100, 200), ids=ids, last=10).cost == 300 == PerplexityTest((), (100, 200), ids=ids, truncated=True).cost


def test_asked_for_by_name(model, corpus, monkeypatch):
    "What verbs ask, without asking it."
    asked = []
    monkeypatch.setattr(evaluate, 'ask_tasks', lambda m, tasks, **kw: asked.append((tasks, kw)) or [dict(rows=[])])
    for kw in (dict(pairs=75), dict(pairs=140), dict(pairs=3), dict(pairs=75, depths=[50])): evaluate.eval_kv(model, **kw)
    assert [None if k['depths'] is None else [round(d / 100 * (t[0].pairs - 1)) for d in k['depths']] for t, k in asked] == [[0, 18, 37, 54, 74], [0, 34, 69, 104, 139], None, [37]]
    def made(m, make, **kw): asked.append(make((2048,), [Subject(model)])); raise PoseError('enough.')
    monkeypatch.setattr(evaluate, 'run_tests', made)
    for data in ('stdlib', str(corpus.jsonl)):
        with pytest.raises(PoseError, match='enough'): evaluate.eval_all(model, tasks='niah_single_2', data=data)
    assert asked[-2][0].task.text is None and asked[-1][0].task.text == '\n\n'.join(evaluate.heldout_texts(str(corpus.jsonl), 'text'))


def test_truncated_and_short_tasks_of_which_one_cannot_be_asked(model, cli, corpus, tmp_path):
    r = cli('eval', 'ppl', model, '--truncated', '--data', corpus.jsonl, '--lengths', '32,64', '--json', '--no-progress')
    assert r.code == 0 and json.loads(r.out)['name'] == 'truncated' and (model/'eval'/'truncated.json').exists(), r.err
    pytest.importorskip('lm_eval')
    from pose_nb.harness import write_task
    q = [dict(question=f'the sea {i}', choices=['wind', 'stone'], answer=i % 2) for i in range(4)]
    write_task(tmp_path/'tasks', 'fine', q, q[:3])
    write_task(tmp_path/'tasks', 'toolong', [x | dict(question='the sea ' * 2000) for x in q], q[:3])
    r = cli('eval', 'all', model, '--tasks', 'passkey', '--lengths', '240', '--trials', '1', '--short', 'fine,toolong', '--include-path', tmp_path/'tasks', '--json', '--no-progress')
    out = json.loads(r.out)
    assert r.code == 0 and list(out['left_out']) == ['toolong'] and {x['task'] for x in read_json(model/'eval'/'short.json')['rows']} == {'fine'} and [x['name'] for x in out['reports']] == ['passkey', 'short']


def test_a_group_of_verbs_says_what_follows(cli):
    for words, says in ((('eval', 'foo'), "unknown command 'eval foo'; choose one of: eval ppl, eval passkey"), (('eval',), "unknown command 'eval'; choose one of: eval ppl"), (('foo',), "unknown command 'foo'")):
        r = cli(*words); assert r.code == 2 and says in r.err, r.err
