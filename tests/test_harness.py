"Short benchmarks: the harness's numbers are those of a hand computation, of the harness itself, of one process and of two; what would make them lie is refused."
import copy, importlib.metadata, importlib.util, json, math, random, shutil, socket, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from conftest import TARGET, WINDOW, WORDS, extend_args, make_model, make_tokenizer
from hypothesis import given, settings, strategies as st
from scipy import stats

pytest.importorskip('lm_eval', reason='needs pip install pose_nb[eval]')
import lm_eval.api.task
from pose_nb import harness
from pose_nb.cli import make_parser
from pose_nb.common import PoseError, read_json, write_json
from pose_nb.data import stdlib_documents
from pose_nb.export import patch_checkpoint
from pose_nb.evaluate import eval_short
from pose_nb.harness import TABLE3, check_rotation, compare_short, mean_interval, paired_interval, short_tasks, write_task
from pose_nb.interpolation import SCALINGS, Linear, YaRN, get_scaling
from pose_nb.model import default_base, load_model, load_tokenizer, set_scaling

ROOT = Path(__file__).parents[1]


def make_questions(n, seed=0, words=6, choices=3):
    rng = random.Random(seed)
    text = lambda k: ' '.join(rng.choice(WORDS) for _ in range(k))
    return [dict(question=text(words), choices=[text(rng.randint(1, 3)) + rng.choice(['', ' ä', ' 語語']) + f' {i}' for i in range(choices)], answer=rng.randrange(choices)) for _ in range(n)]


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    d = tmp_path_factory.mktemp('tasks')
    write_task(d, 'words', make_questions(24), make_questions(12, seed=1))
    write_task(d, 'long', make_questions(6, words=WINDOW), make_questions(4, seed=1))
    return d


@pytest.fixture(scope='module')
def model(): return make_model()
@pytest.fixture(scope='module')
def tok(): return make_tokenizer()


@pytest.fixture(scope='module')
def ask(tasks, model, tok):
    return lambda net=None, name='words', **kw: short_tasks(model if net is None else net, kw.pop('tokenizer', None if isinstance(net, (str, Path)) else tok), name, include_path=tasks, progress=False, **kw)


@torch.no_grad()
def likelihood(model, tok, prompt, answer):
    before, ids = tok(prompt)['input_ids'], torch.tensor([tok(prompt + answer)['input_ids']])
    logp = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logp[len(before) - 1:].sum().item()


def test_accuracy_is_that_of_a_hand_computation(ask, model, tok):
    acc, norm = ask().rows
    ll = [[likelihood(model, tok, q['question'], ' ' + c) for c in q['choices']] for q in make_questions(24)]
    assert acc.values.tolist() == [int(np.argmax(l) == q['answer']) for l, q in zip(ll, make_questions(24))]
    by = lambda length: [int(np.argmax([x / length(c) for x, c in zip(l, q['choices'])]) == q['answer']) for l, q in zip(ll, make_questions(24))]
    assert norm.values.tolist() == by(len)                                        # characters, without the space in front
    assert by(len) != by(lambda c: len(c.encode()))                               # these questions can tell characters from bytes
    assert (acc.metric, norm.metric, acc.questions, acc.shots, acc.truncated, acc.version) == ('acc', 'acc_norm', 24, 0, 0, 1)
    assert acc.value == np.mean(acc.values) and acc.stderr == pytest.approx(np.std(acc.values, ddof=1) / math.sqrt(24))


@pytest.mark.parametrize('shots', [0, 3])
def test_the_same_numbers_as_the_harness_run_by_itself(shots, ask, tasks, model, tok):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    theirs = simple_evaluate(model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=4, max_length=512), tasks=['words'], num_fewshot=shots, bootstrap_iters=10,
                             task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    wide = set_scaling(make_model(), Linear(8.), 8 * WINDOW)                      # reads 512 tokens ...
    wide.model.rotary_emb = model.model.rotary_emb; wide.config.rope_parameters = model.config.rope_parameters     # ... with the rotation of the other
    mine = ask(wide, shots=shots)
    for r in mine.rows:
        assert r.value == theirs['results']['words'][f'{r.metric},none'] and r.stderr == pytest.approx(theirs['results']['words'][f'{r.metric}_stderr,none'])
        assert [s[r.metric] for s in sorted(theirs['samples']['words'], key=lambda s: s['doc_id'])] == r.values.tolist()
        assert r.shots == shots


STAND_INS = {
    'aps/super_glue': lambda t, i: dict(passage=t(8), question=t(4), label=i % 2),
    'baber/piqa': lambda t, i: dict(goal=t(4), sol1=t(3), sol2=t(2), label=i % 2),
    'allenai/winogrande': lambda t, i: dict(sentence=f'{t(3)} _ {t(3)}', option1=t(1), option2=t(2), answer=str(1 + i % 2)),
    'truthfulqa/truthful_qa': lambda t, i: dict(question=t(4), mc1_targets=dict(choices=[t(2), t(3)], labels=[1, 0]), mc2_targets=dict(choices=[t(1), t(2), t(3)], labels=[1, 1, 0])),
    'allenai/ai2_arc': lambda t, i: dict(question=t(4), choices=dict(text=[t(1), t(2), t(3), t(2)], label=list('ABCD')), answerKey='ABCD'[i % 4]),
    'Rowan/hellaswag': lambda t, i: dict(activity_label=t(1), ctx_a=t(3), ctx_b=t(1), endings=[t(3), t(2), t(4), t(3)], label=str(i % 4))}


@pytest.fixture
def stand_in_data(monkeypatch):
    "Data sets of the six tasks with the hub's fields and made-up words."
    from datasets import Dataset, DatasetDict
    def load(path, name=None, **kw):
        rng = random.Random(path)
        rows = [STAND_INS[path](lambda k: ' '.join(rng.choice(WORDS) for _ in range(k)), i) for i in range(36)]
        return DatasetDict(train=Dataset.from_list(rows[:30]), validation=Dataset.from_list(rows[30:]), test=Dataset.from_list(rows[30:]))
    monkeypatch.setattr(lm_eval.api.task.datasets, 'load_dataset', load)


def test_the_six_columns_run_with_the_papers_shots_and_metrics(stand_in_data, tok, monkeypatch):
    net, prompts = set_scaling(make_model(), Linear(64.), 64 * WINDOW), {}
    real = harness._check_requests
    monkeypatch.setattr(harness, '_check_requests', lambda lm, requests: prompts.update({r.task_name: r.args[0] for r in lm.asked}) or real(lm, requests))
    r = short_tasks(net, tok, progress=False, include_path=None)
    assert [(x.task, x.shots, x.metric) for x in r.rows] == [(t, c['shots'], c['metric']) for t, c in TABLE3.items()] and {x.questions for x in r.rows} == {6}
    assert prompts['arc_challenge'].count('Question:') == 26 and prompts['hellaswag'].count('\n\n') == 10 and prompts['boolq'].count('Question:') == 1
    assert prompts['truthfulqa_mc2'].count('Q: ') == 7                            # six fixed examples, whatever the shots
    rng = random.Random('truthfulqa/truthful_qa')
    docs = [STAND_INS['truthfulqa/truthful_qa'](lambda k: ' '.join(rng.choice(WORDS) for _ in range(k)), i) for i in range(36)][30:]
    head = prompts['truthfulqa_mc2'].rsplit('\n\nQ: ', 1)[0]
    for d, got in zip(docs, r['truthfulqa_mc2'].values):
        p = np.exp([likelihood(net, tok, f"{head}\n\nQ: {d['question']}\nA:", ' ' + c) for c in d['mc2_targets']['choices']])
        assert got == pytest.approx((p[0] + p[1]) / p.sum(), rel=1e-4)
    assert r['truthfulqa_mc2'].interval == pytest.approx(stats.t.interval(.95, 5, r['truthfulqa_mc2'].value, r['truthfulqa_mc2'].stderr))
    with pytest.raises(PoseError, match='fixed prompt.*3 shots'): short_tasks(net, tok, 'truthfulqa_mc2', shots=3, progress=False)
    only = short_tasks(net, tok, ['arc_challenge', 'piqa'], shots=dict(arc_challenge=2), limit=2, progress=False)
    assert [(x.shots, x.questions) for x in only.rows] == [(2, 2), (0, 2)]
    again = compare_short(r, r)
    assert [x.task for x in again.rows] == list(TABLE3) and all(x.low <= 0 <= x.high for x in again.rows)


def test_a_group_of_tasks_is_taken_apart(stand_in_data, tok):
    net = set_scaling(make_model(), Linear(64.), 64 * WINDOW)
    r = short_tasks(net, tok, 'ai2_arc', limit=2, progress=False)
    assert {(x.task, x.metric) for x in r.rows} == {('arc_easy', 'acc'), ('arc_easy', 'acc_norm'), ('arc_challenge', 'acc_norm')}


def test_every_scaling_is_recognised_in_its_folder(checkpoint, tmp_path):
    for name in SCALINGS:
        kw = dict(long_factor=[1. + i for i in range(8)]) if name == 'longrope' else {}
        folder = patch_checkpoint(checkpoint(), get_scaling(name, 4. if name != 'none' else 1., **kw), TARGET if name != 'none' else WINDOW, tmp_path/name)
        r = check_rotation(load_model(folder), folder)
        assert r['recorded'] and r['length'] == (TARGET if name != 'none' else WINDOW) and r['original'] == WINDOW, (name, r)
        assert ask_one(folder).rotation == r


def ask_one(folder):
    write_task(Path(folder).parent/'one', 'one', make_questions(2))
    return short_tasks(folder, tasks='one', include_path=Path(folder).parent/'one', progress=False)


def test_a_trained_folder_is_recognised_and_a_changed_one_refused(cli, checkpoint, corpus, tmp_path):
    out = tmp_path/'out'
    assert cli(*extend_args(checkpoint(), corpus.jsonl, out, no_progress=True)).code == 0
    assert ask_one(out).rotation == dict(scaling='yarn', factor=4., original=WINDOW, length=TARGET, recorded=True)
    config = read_json(out/'config.json')
    changes = dict(lost=dict(rope_parameters=dict(rope_theta=10_000., rope_type='default')), shorter=dict(rope_parameters=config['rope_parameters'] | dict(factor=2.), max_position_embeddings=128))
    for change in changes.values():
        write_json(out/'config.json', {k: v for k, v in config.items() if k != 'rope_scaling'} | change)
        with pytest.raises(PoseError, match='restore config.json'): ask_one(out)
        with pytest.raises(PoseError, match='restore config.json'): eval_short(str(out), 'one', include_path=str(tmp_path/'one'), progress=False)
    write_json(out/'config.json', config)
    write_json(out/'pose_nb.json', {k: v for k, v in read_json(out/'pose_nb.json').items() if k != 'rope'})
    with pytest.raises(PoseError, match='not finished'): ask_one(out)


def test_without_the_interpolation_the_damage_is_invisible(tmp_path):
    from transformers import AutoModelForCausalLM
    rng, files, questions = random.Random(0), [t.splitlines() for t in stdlib_documents('heldout').values()], []
    while len(questions) < 60:                                                    # which line of a file comes next?
        f = rng.choice(files); i = rng.randrange(4, len(f)); c = [f[i], *rng.sample(f, 2)]
        if all(5 < len(l.strip()) < 60 for l in [f[i - 1], *c]): questions.append(dict(question='\n'.join(f[i - 4:i])[-200:], choices=c, answer=0))
    write_task(tmp_path, 'lines', questions, delimiter='\n')
    ask = lambda net: short_tasks(net, load_tokenizer(default_base()), 'lines', include_path=tmp_path, progress=False)
    base, folder = load_model(default_base()), patch_checkpoint(default_base(), Linear(8.), 2048, tmp_path/'out')
    lost = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=base.config.rope_parameters, max_position_embeddings=256)
    hidden, shown = compare_short(ask(base), ask(lost)), compare_short(ask(base), ask(folder))
    assert all(r.worse == r.better == 0 and r.difference == 0 for r in hidden.rows)
    assert all(r.worse > r.better for r in shown.rows)
    assert shown.rotations['extended']['scaling'] == 'linear' and hidden.rotations['extended'] == dict(scaling='none', factor=1., original=256, length=256, recorded=False)


def test_frequencies_that_are_not_those_of_the_config_are_refused(tok, ask):
    net = make_model(); net.model.rotary_emb.inv_freq = net.model.rotary_emb.inv_freq / 4
    with pytest.raises(PoseError, match='did not take up none'): ask(net)
    with pytest.raises(PoseError, match='float16'): ask(make_model().half())


def test_a_comparison_is_paired(ask):
    a, b = ask(), ask(set_scaling(make_model(), Linear(16.), 16 * WINDOW))
    for x, y, r in zip(a.rows, b.rows, compare_short(a, b).rows):
        assert (r.base, r.extended, r.difference) == (x.value, y.value, y.value - x.value) and r.better - r.worse == round(24 * r.difference)
        assert (r.low, r.high) == paired_interval(x.values, y.values) and r.low <= r.difference <= r.high
    assert compare_short(a, b).table().shape == (2, 12) and compare_short(a, b).plot() and a.plot()


def test_results_of_other_questions_are_not_compared(ask, tok):
    a = ask(limit=8)
    for kw, says in ((dict(limit=9), 'limit 8 and the extended one with limit 9'), (dict(limit=8, seed=2), 'seed'), (dict(limit=8, bos=False), 'bos'), (dict(limit=8, name='long', truncate=True), 'the same tasks'), (dict(limit=8, shots=1, truncate=True), 'shots')):
        with pytest.raises(PoseError, match=says): compare_short(a, ask(**kw))
    b = ask(limit=8, shots=2, truncate=True)
    other = ask(limit=8, shots=2, truncate=True, seed=7)
    object.__setattr__(other, 'protocol', other.protocol | dict(seed=1234))
    with pytest.raises(PoseError, match='digest'): compare_short(b, other)         # the examples in the prompts differ
    for r in other.rows: object.__setattr__(r, 'values', None)
    with pytest.raises(PoseError, match='read from a file'): compare_short(other, other)


pairs = st.integers(1, 60).flatmap(lambda n: st.tuples(st.lists(st.integers(0, 1), min_size=n, max_size=n), st.lists(st.integers(0, 1), min_size=n, max_size=n)))


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_paired_intervals_are_sane(ab):
    a, b = (np.array(x, float) for x in ab)
    low, high = paired_interval(a, b)
    assert -1 <= low < high <= 1 and low <= (b - a).mean() * len(a) / (len(a) + 2) <= high
    assert paired_interval(b, a) == pytest.approx((-high, -low))


def test_paired_interval_is_bonett_and_prices_and_students_for_shares():
    a, b = np.r_[np.ones(30), np.zeros(70)], np.r_[np.zeros(6), np.ones(24), np.ones(2), np.zeros(68)]       # 6 worse, 2 better
    p, q, z = 7 / 102, 3 / 102, stats.norm.ppf(.975)
    half = z * math.sqrt((p + q - (q - p)**2) / 102)
    assert paired_interval(a, b) == pytest.approx((q - p - half, q - p + half))
    x, y = np.array([.2, .5, .9]), np.array([.1, .7, .95])
    d = y - x
    assert paired_interval(x, y) == pytest.approx(stats.t.interval(.95, 2, d.mean(), d.std(ddof=1) / math.sqrt(3)))
    assert paired_interval(x[:1], y[:1]) is None and paired_interval(x, x) == (0, 0) and mean_interval(x[:1]) is None
    assert paired_interval(x, np.array([1., 1, 1]))[1] > 0 and mean_interval(np.array([1., 1])) == pytest.approx((stats.binomtest(2, 2).proportion_ci(method='wilson').low, 1))
    assert paired_interval(np.array([.5, .5]), np.array([0., 1.])) == pytest.approx(stats.t.interval(.95, 1, 0, .5))      # differences of -.5 and .5


def test_prompts_that_are_too_long_stop_it_or_are_counted(ask, model, tok):
    with pytest.raises(PoseError, match=rf"reads {WINDOW} tokens and questions have up to \d+: too long are 6 of task 'long'.*--truncate"): ask(name='long')
    assert ask(name='long', truncate=True)['long'].truncated == 6
    over = sum(max(len(tok(q['question'] + ' ' + c)['input_ids']) for c in q['choices']) - 1 > WINDOW for q in make_questions(6, words=WINDOW))
    assert over == 6 and ask(set_scaling(make_model(), YaRN(8.), 8 * WINDOW), name='long')['long'].truncated == 0
    seen = ask(shots=2, truncate=True)
    assert 0 < seen['words'].truncated <= 24


def test_processes_seeds_batches_and_modes_change_nothing(ask, model, tok, tasks):
    model.train(); before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), tok.pad_token, len(tok), tok.model_max_length
    a, b = ask(shots=1, batch_size=1, truncate=True), ask(shots=1, batch_size=5, truncate=True)
    assert model.training and torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and before[2:] == (random.getstate(), tok.pad_token, len(tok), tok.model_max_length)
    model.eval()
    assert [r.values.tolist() for r in a.rows] == [r.values.tolist() for r in b.rows] and a.rows[0].digest == b.rows[0].digest
    assert ask(shots=1, truncate=True, seed=5).rows[0].digest != a.rows[0].digest


def test_bos_follows_the_tokenizer_and_can_be_left_out(ask, model):
    assert ask().protocol['bos'] and not ask(bos=False).protocol['bos'] and ask(bos=True).protocol['bos']
    plain = make_tokenizer(bos=False)
    assert not ask(tokenizer=plain).protocol['bos']
    with pytest.raises(PoseError, match='no beginning-of-sequence'): ask(tokenizer=plain, bos=True)
    from tokenizers import processors
    ends = make_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    with pytest.raises(PoseError, match='end-of-sequence'): ask(tokenizer=ends)
    assert ask(tokenizer=ends, bos=False).rows[0].values.tolist() == ask(bos=False).rows[0].values.tolist()


def test_it_is_quiet_and_bars_go_to_stderr(ask, tasks, model, tok, capfd):
    ask(); out, err = capfd.readouterr()
    assert out == err == ''
    short_tasks(model, tok, 'words', include_path=tasks, progress=True); out, err = capfd.readouterr()
    assert out == ''


BAD = dict(
    unknown=(dict(name='words2'), "unknown task 'words2'"), close=(dict(name='truthfulqa_mc'), 'close names are truthfulqa_mc'), nothing=(dict(name=''), 'tasks is empty'), none=(dict(name=[]), 'tasks is empty'),
    twice=(dict(name='words,words'), 'named twice'), limit=(dict(limit=0), 'limit is 0'), fraction=(dict(limit=.5), 'limit is 0.5'), shots=(dict(shots=-1), 'shots is -1'), batch=(dict(batch_size=0), 'batch_size is 0'),
    seed=(dict(seed=-1), 'seed is -1'), big_seed=(dict(seed=2**32), 'seed 4294967296 is too large'), offline=(dict(name='boolq'), "'aps/super_glue' is on the hub"), folder=(dict(net='./nowhere'), 'no checkpoint folder'))


@pytest.mark.parametrize('case', BAD)
def test_bad_requests_get_one_sentence(case, ask):
    kw, says = BAD[case]
    with pytest.raises(PoseError, match=says) as e: ask(**kw)
    assert str(e.value).endswith('.') and '\n' not in str(e.value) and e.value.__cause__ is None


def test_bad_task_files_get_one_sentence(model, tok, tmp_path):
    ask = lambda name, folder=tmp_path: short_tasks(model, tok, name, include_path=folder, progress=False)
    with pytest.raises(PoseError, match='is not a folder'): ask('words', tmp_path/'nowhere')
    good = read_json(write_task(tmp_path, 'good', make_questions(3)))
    make = lambda name, **kw: write_json(tmp_path/f'{name}.yaml', good | dict(task=name) | kw)
    make('gone', dataset_kwargs=dict(data_files=dict(test=str(tmp_path/'gone.jsonl')), cache_dir=str(tmp_path/'.cache')))
    with pytest.raises(PoseError, match="task 'gone' cannot be loaded.*correct its yaml file"): ask('gone')
    make('writes', output_type='generate_until', metric_list=[dict(metric='exact_match', aggregation='mean', higher_is_better=True)])
    with pytest.raises(PoseError, match='of type generate_until'): ask('writes')
    make('f1', metric_list=[dict(metric='f1', aggregation='f1', higher_is_better=True)])
    with pytest.raises(PoseError, match='no metric that is a mean over questions'): ask('f1')
    (tmp_path/'broken.yaml').write_text('task: broken\n  x: [')
    with pytest.raises(PoseError, match="unknown task 'broken'"): ask('broken')
    make('empty_answer', target_delimiter='', dataset_kwargs=dict(data_files=dict(test=str(tmp_path/'empty.jsonl')), cache_dir=str(tmp_path/'.cache')))
    (tmp_path/'empty.jsonl').write_text(json.dumps(dict(question='the sea', choices=['stone', 'wind'], answer=0)) + '\n' + json.dumps(dict(question='the sea', choices=['', 'wind'], answer=0)) + '\n')
    with pytest.raises(PoseError, match='has 0 tokens; it must have 1 to 64'): ask('empty_answer')
    write_task(tmp_path, 'endless', [dict(question='the sea', choices=['wind ' * 200, 'wind'], answer=0)])
    with pytest.raises(PoseError, match="task 'endless' has .* tokens; it must have 1 to 64"): ask('endless')
    for bad in (dict(question='a', choices=['b'], answer=1), dict(question='a', choices=['b'], answer=-1), dict(question='a', choices=['b'], answer='b'), dict(question='a', answer=0), dict(question='a', choices=['b', ''], answer=0), 'a'):
        with pytest.raises(PoseError, match='entry 0'): write_task(tmp_path, 'bad', [bad])
    with pytest.raises(PoseError, match='no questions'): write_task(tmp_path, 'bad', [])


def test_bad_models_get_one_sentence(ask, tok):
    with pytest.raises(PoseError, match='knows 0 to 199; use the tokenizer of this model'): ask(make_model(vocab=200))
    broken = make_model(); broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(PoseError, match='not numbers'): ask(broken)
    with pytest.raises(PoseError, match='needs its tokenizer'): short_tasks(make_model(), tasks='piqa')


def test_without_the_harness_one_sentence(monkeypatch, ask):
    with monkeypatch.context() as m:
        m.setattr(importlib.util, 'find_spec', lambda name: None)
        with pytest.raises(PoseError, match=r"pip install 'pose_nb\[eval\]'"): ask()
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.4.9')
    with pytest.raises(PoseError, match='lm_eval 0.4.9 is too old'): ask()


def test_the_command_saves_table_figure_and_card(checkpoint, tasks, tmp_path):
    folder, base = patch_checkpoint(checkpoint(), Linear(16.), 16 * WINDOW, tmp_path/'long'), shutil.copytree(checkpoint(), tmp_path/'base')
    options = dict(vars(make_parser(eval_short, 'pose_nb eval short').parse_args([str(folder), '--tasks', 'words', '--include-path', str(tasks), '--compare', str(base), '--no-progress'])))
    r = eval_short(**options)
    saved = read_json(folder/'eval'/'short.json')
    assert (folder/'eval'/'short.svg').exists() and saved['rows'] == r['rows'] and not (base/'eval').exists()
    assert [(x['model'], x['task']) for x in r['rows']] == [('long', 'words')] * 2 + [('base', 'words')] * 2 and saved['differences'] == r['differences']
    assert [x['task'] for x in r['differences']] == ['words'] * 2 and {'base', 'model', 'difference', 'low', 'high', 'worse', 'better', 'clear'} <= r['differences'][0].keys()
    assert 'Short benchmarks' in (folder/'README.md').read_text() and 'linear x16' in r['text'] and 'long compared with base' in r['text'] and 'Bonett and Price' in r['protocol']
    json.dumps(r)
    alone = eval_short(str(base), 'words', include_path=str(tasks), output_dir=str(tmp_path/'there'), limit=5, progress=False)
    assert (tmp_path/'there'/'eval'/'short.json').exists() and not (base/'eval').exists() and alone['rows'][0]['questions'] == 5
    assert make_parser(eval_short, 'x').parse_args(['m']).tasks.split(',') == list(TABLE3)


PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from pose_nb.common import PoseError
from pose_nb.engines import join, leave
from pose_nb.evaluate import eval_short
from pose_nb.harness import short_tasks
folder, tasks, out = sys.argv[1:]
i = join().process_index
ask = lambda **kw: short_tasks(folder, tasks='words', include_path=tasks, shared=True, **kw)
results = [ask(), ask(shots=2, truncate=True), ask(limit=1)]
says = eval_short(folder, 'words', include_path=tasks, output_dir=out, progress=False)['text']
try: ask(shots=2)
except PoseError as e: said = [getattr(e, 'told', False), str(e)]
json.dump(dict(rows=[[x.to_dict() | dict(values=x.values.tolist()) for x in r.rows] for r in results], said=said, says=says), open(f'{out}-{join().num_processes}-{i}.json', 'w'))
leave(0)
"""


def test_two_processes_ask_the_questions_of_one_and_both_get_the_numbers(checkpoint, tasks, tmp_path):
    (tmp_path/'ask.py').write_text(PROGRAM)
    for n in (1, 2):
        with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
        line = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'configs'/'accelerate'/'ddp.yaml', '--num_processes', n, '--main_process_port', port, tmp_path/'ask.py', checkpoint(), tasks, tmp_path/'out']
        r = subprocess.run([str(w) for w in line], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    one, a, b = (read_json(tmp_path/f'out-{p}.json') for p in ('1-0', '2-0', '2-1'))
    assert one['rows'] == a['rows'] == b['rows']                                   # values, digests and counts of cut prompts
    assert one['says'] == a['says'] == b['says'] and (tmp_path/'out'/'eval'/'short.json').exists()
    assert one['said'][1] == a['said'][1] == b['said'][1] and [a['said'][0], b['said'][0]] == [False, True]


def test_the_module_loads_without_the_harness():
    code = "import sys, pose_nb.harness; print([m for m in sys.modules if m.split('.')[0] == 'lm_eval'])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120).stdout.strip().splitlines()[-1] == '[]'
