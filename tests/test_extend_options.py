"Every option of `extend` does what its help says, alone and together, also after a stop; and what cannot work is one sentence."
import contextlib, gzip, json, os, shutil, signal, sys, threading

import pytest, torch
from conftest import TARGET, command, extend_args, make_model, make_texts, make_tokenizer, snapshot
from safetensors.torch import load_file

import pose_nb.train as pt, pose_nb.watch as watch
from pose_nb.checkpoint import checkpoints
from pose_nb.common import PoseError
from pose_nb.train import read_log
from pose_nb.workflow import extend

EXAM = dict(eval_steps=2, eval_windows=2, eval_prompts=2)
TIMES = ('seconds', 'tokens_per_second', 'data_seconds', 'peak_gib')


def write(path, texts): path.write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts)); return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Folder with a.jsonl, b.jsonl, unseen.jsonl, and a name that is hard to read."
    d = tmp_path_factory.mktemp('dä ta')
    write(d/'a.jsonl', make_texts()); write(d/'b.jsonl', make_texts(20, seed=1)); write(d/'unseen.jsonl', make_texts(6, 400, seed=9)); write(d/'ü 名: x:0.5', make_texts(20, seed=3))
    return d


def words(model, files, out, *more, data=('a.jsonl',), **kw):
    w = extend_args(model, None, out, **dict(max_steps=6) | kw)
    return w + ['--data', *(f'{files}/{n}' for n in data), *more]


def exam_words(files, **kw):
    return [x for k, v in (EXAM | dict(eval_data=files/'unseen.jsonl') | kw).items() for x in (f"--{k.replace('_', '-')}", str(v))]


@contextlib.contextmanager
def replaced(module, name, f):
    "Put another function in place of one of a module, which it gets as its first argument."
    real = getattr(module, name)
    setattr(module, name, lambda *a, **k: f(real, *a, **k))
    try: yield
    finally: setattr(module, name, real)


def stopping_at(step): return replaced(pt, 'train_step', lambda real, *a: (signal.raise_signal(signal.SIGTERM) if a[-1] == step - 1 else None, real(*a))[1])


def log(out): return [{k: v for k, v in r.items() if k not in TIMES} for r in read_log(out)]


def assert_same(a, b):
    x, y = (load_file(f/'model.safetensors') for f in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) and log(a) == log(b)


def refused(r, says):
    assert r.code == 2 and says in r.err and 'Traceback' not in r.err, (r.code, r.err)
    assert r.err.strip().splitlines()[-1].startswith('pose_nb') and not r.out


KINDS = dict(
    sources=('llama', {}, ['a.jsonl:0.7', 'b.jsonl:0.3'], []), stream=('llama', {}, ['a.jsonl'], ['--stream', '--mix-original', '.4']), lora=('llama', {}, ['a.jsonl'], ['--lora-r', '4', '--bf16']),
    tied=('llama', dict(tie_word_embeddings=True), ['a.jsonl'], ['--lora-r', '4', 'best']), e2llm=('llama', {}, ['a.jsonl'], ['--sampler', 'e2llm', '--scaling', 'linear', 'exam']),
    sliding=('mistral', dict(sliding_window=48), ['a.jsonl'], ['best']), whole=('llama', {}, ['a.jsonl'], ['best', '--save-steps', '1', '--save-total-limit', '1']))


@pytest.mark.parametrize('kind', KINDS)
def test_every_option_resumes_with_equal_bits(kind, checkpoint, files, cli, tmp_path):
    name, config, data, more = KINDS[kind]
    more = [x for m in more for x in (exam_words(files) + ['--load-best-model-at-end'] * (m == 'best') if m in ('best', 'exam') else [m])]
    run = lambda out, *also: cli(*words(checkpoint(name, **config), files, out, *more, *also, data=data))
    assert run(tmp_path/'whole').code == 0
    with stopping_at(3): assert run(tmp_path/'parts').code == 143
    r = run(tmp_path/'parts', '--resume-from-checkpoint', 'latest')
    assert r.code == 0, r.err
    assert_same(tmp_path/'whole', tmp_path/'parts')


def test_several_sources_are_read_in_their_shares(checkpoint, files, cli, tmp_path):
    r = cli(*words(checkpoint(), files, tmp_path/'o', '--json', data=['a.jsonl:3', 'ü 名: x:0.5:1'], max_steps=1))
    sources = json.loads(r.out)['data']['sources']
    assert r.code == 0 and {k.rsplit('/')[-1]: v['share'] for k, v in sources.items()} == {'a.jsonl': .75, 'ü 名: x:0.5': .25}
    again = cli(*words(checkpoint(), files, tmp_path/'p', '--json', '--data', f'{files}/b.jsonl', max_steps=1))       # a second --data adds to the first
    assert list(json.loads(again.out)['data']['sources']) == [f'{files}/a.jsonl', f'{files}/b.jsonl']
    python = extend(checkpoint(), TARGET, {files/'a.jsonl': 3, files/'b.jsonl': 1}, tmp_path/'q', max_steps=1, progress=False)
    assert [s['share'] for s in python['data']['sources'].values()] == [.75, .25]


def test_workers_change_nothing_of_a_stream(checkpoint, files, cli, tmp_path):
    for n in ('0', '2'): assert cli(*words(checkpoint(), files, tmp_path/n, '--stream', '--dataloader-num-workers', n, data=['a.jsonl:1', 'b.jsonl:2'])).code == 0
    assert_same(tmp_path/'0', tmp_path/'2')


@pytest.mark.parametrize('more', [[], ['--lora-targets', ' q_proj, v_proj'], ['--lora-targets', 'attention', '--lora-only']], ids=['every', 'names', 'attention'])
def test_lora_leaves_a_plain_model(more, checkpoint, files, cli, tmp_path):
    from transformers import AutoModelForCausalLM
    r = cli(*words(checkpoint(), files, tmp_path/'o', '--lora-r', '4', *more))
    assert r.code == 0, r.err
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (checkpoint(), tmp_path/'o'))
    moved = {n.split('.')[-2] for n in before if not torch.equal(before[n], after[n])}
    assert before.keys() == after.keys() and not any('lora' in n for n in load_file(tmp_path/'o'/'model.safetensors'))
    assert {'q_proj', 'v_proj'} <= moved and ('embed_tokens' in moved) == ('--lora-only' not in more) and ('up_proj' in moved) == (not more) and 'lm_head' not in moved
    assert 'lora | r 4' in (tmp_path/'o'/'README.md').read_text()


def test_exams_are_in_log_figure_and_card(checkpoint, files, cli, tmp_path):
    out = tmp_path/'o'
    r = cli(*words(checkpoint(), files, out, *exam_words(files), '--json', max_steps=5))
    record, rows = json.loads(r.out), [x for x in read_log(out) if 'eval_long_loss' in x]
    assert [x['step'] for x in rows] == [2, 4, 5] and list(rows[0]['eval_passkey_by_depth']) == ['0.0', '1.0']
    assert record['base_short_loss'] > 0 and record['exam']['windows'] == 2 and record['result']['eval_long_loss'] == rows[-1]['eval_long_loss']
    assert rows[0]['eval_short_rise'] == rows[0]['eval_short_loss'] - record['base_short_loss']
    card = (out/'README.md').read_text()
    assert (out/'watch.svg').exists() and 'watch.svg' in card and 'eval_long_loss' in card and not (out/'best').exists()


@pytest.mark.parametrize('metric', ['long-loss', 'short_loss', 'passkey'])
def test_the_best_exam_is_saved(metric, checkpoint, files, cli, tmp_path):
    "The last exams are made the worst ones; what is saved is what an equal run holds after its second step."
    loss = lambda real, *a: (calls.append(0), 1. + len(calls))[1]
    calls, out = [], tmp_path/'o'
    with replaced(watch, 'mean_loss', loss): r = cli(*words(checkpoint(), files, out, *exam_words(files), '--load-best-model-at-end', '--metric-for-best-model', metric, '--lr-scheduler-type', 'constant'))
    assert r.code == 0, r.err
    assert json.loads((out/'best.json').read_text())['step'] == 2 == json.loads((out/'pose_nb.json').read_text())['result']['best_step']
    assert cli(*words(checkpoint(), files, tmp_path/'two', '--lr-scheduler-type', 'constant', max_steps=2)).code == 0
    best, two, kept = (load_file(f) for f in (out/'model.safetensors', tmp_path/'two'/'model.safetensors', out/'best'/'trained.safetensors'))
    assert all(torch.equal(best[n], two[n]) and torch.equal(best[n], kept[n]) for n in best)


def test_scores_of_another_exam_or_no_number_do_not_win(checkpoint, files, cli, tmp_path):
    go = lambda out, *more, **kw: cli(*words(checkpoint(), files, out, *exam_words(files, **kw), '--load-best-model-at-end', *more))
    with stopping_at(3): go(tmp_path/'o')
    best = tmp_path/'o'/'best.json'
    best.write_text(json.dumps(json.loads(best.read_text()) | dict(score=[0.])))          # an exam that was much easier
    r = go(tmp_path/'o', '--resume-from-checkpoint', eval_windows=3)
    assert r.code == 0 and 'cannot be compared' in r.err and json.loads(best.read_text())['step'] > 3
    answers = iter([2., 2., float('nan'), float('nan'), 800., 800.])
    with replaced(watch, 'mean_loss', lambda *a: next(answers)): r = go(tmp_path/'p')
    assert r.code == 0 and json.loads((tmp_path/'p'/'best.json').read_text())['step'] == 2, r.err


def test_the_gate_warns_or_stops_with_its_own_exit_code(checkpoint, files, cli, tmp_path):
    gate = ['--max-short-loss', '0', *exam_words(files)]
    with replaced(watch, 'mean_loss', lambda *a: 50.):
        r = cli(*words(checkpoint(), files, tmp_path/'o', *gate))
        assert r.code == 0 and 'short texts cost' in r.err and '--mix-original' in r.err
        r = cli(*words(checkpoint(), files, tmp_path/'p', *gate, '--stop-on-short-loss'))
    assert r.code == 3 and 'stopped after step 4, as --stop-on-short-loss asks' in r.err and checkpoints(tmp_path/'p')


def test_tensorboard_gets_a_file_and_json_stays_json(checkpoint, files, cli, tmp_path):
    pytest.importorskip('tensorboard')
    r = cli(*words(checkpoint(), files, tmp_path/'o', '--report-to', 'tensorboard', '--json', *exam_words(files)))
    assert json.loads(r.out)['status'] == 'done' and list((tmp_path/'o').rglob('events.out.tfevents*'))
    with replaced(pt, 'seam_guard', lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory.'))):
        refused(cli(*words(checkpoint(), files, tmp_path/'p', '--report-to', 'tensorboard')), 'not enough memory')
    assert not (tmp_path/'p').exists()


def test_a_dry_run_writes_nothing_and_refuses_what_a_run_would(checkpoint, files, cli, tmp_path):
    dry = lambda out, *more, **kw: cli(*words(checkpoint(), files, out, '--dry-run', *more, **kw))
    r = dry(tmp_path/'o', '--json', '--lora-r', '4', '--report-to', 'tensorboard', '--stream', *exam_words(files))
    got = json.loads(r.out)
    assert got['status'] == 'dry run' and 'exam: every 2 steps, 2 windows of 64 and of 256 tokens' in got['text'] and 'example 2:' in got['text'] and not (tmp_path/'o').exists()
    (tmp_path/'empty').mkdir()
    assert dry(tmp_path/'empty').code == 0 and not any((tmp_path/'empty').iterdir())
    refused(dry(tmp_path/'o', '--eval-steps', '2'), '--eval-data')
    refused(dry(tmp_path/'o', '--lora-r', '4', '--lora-targets', 'nope'), 'no linear layer named nope')
    with stopping_at(3): cli(*words(checkpoint(), files, tmp_path/'run'))
    before = snapshot(tmp_path/'run')
    refused(dry(tmp_path/'run'), 'already holds another run')
    refused(dry(tmp_path/'run', '--resume-from-checkpoint', '--seed', '1'), 'other settings')
    assert dry(tmp_path/'run', '--resume-from-checkpoint').code == 0 and snapshot(tmp_path/'run') == before


SAYS = {'--eval-windows 3': 'eval_windows needs exams', '--eval-prompts 0 --eval-windows 2': 'eval_windows and eval_prompts need exams', '--max-short-loss 0': 'max_short_loss needs exams', '--eval-data UNSEEN': 'eval_data needs exams',
        '--eval-steps 2 --eval-data UNSEEN --stop-on-short-loss': 'without max_short_loss', '--eval-steps 2 --eval-data UNSEEN --max-short-loss nan': 'max_short_loss is nan', '--metric-for-best-model passkey': 'without load_best_model_at_end',
        '--eval-steps 2 --eval-data SAME': 'also trained on', '--eval-steps 2 --eval-data FOLDER': 'also trained on', '--eval-steps 2 --eval-data UNSEEN --target 100': '--eval-prompts 0', '--eval-steps 2 --eval-data SHORT': 'give longer documents with --eval-data',
        '--stream --num-proc 2': 'does nothing for a stream', '--num-proc 0': 'num_proc is 0', '--stream --passkey-share .2': 'stored text', '--sampler e2llm --scaling linear --mix-original .2': 'e2llm', '--mix-original 1': 'leave room for text',
        '--lora-targets q_proj': '--lora-r', '--load-in-4bit': '--lora-r', '--lora-r -1': 'rank r is -1', '--lora-r 4 --lora-targets ,': 'targets are empty', '--report-to paper': "unknown report_to 'paper'", '--save-total-limit 0': 'save_total_limit is 0',
        '--data EMPTY': 'the text is empty', '--data SAME': 'named twice', '--data UNSEEN:1': 'no weight', '--resume-from-checkpoint': 'no run to resume'}


@pytest.mark.parametrize('more', SAYS)
def test_what_cannot_work_is_refused_in_one_sentence(more, checkpoint, files, short_corpus, cli, tmp_path):
    names = dict(UNSEEN=str(files/'unseen.jsonl'), SAME=f'{files}/../{files.name}/a.jsonl', FOLDER=str(files), SHORT=str(short_corpus), EMPTY='')
    swap = lambda w: names[w] if w in names else w.replace('UNSEEN', names['UNSEEN'])
    refused(cli(*words(checkpoint(), files, tmp_path/'o', '--json', *map(swap, more.split()))), SAYS[more])
    assert not (tmp_path/'o').exists()


def test_ids_that_the_model_does_not_have_are_refused_everywhere(files, cli, tmp_path):
    base = tmp_path/'base'
    make_model(vocab=270).save_pretrained(base); make_tokenizer().save_pretrained(base)
    for more in ([], ['--stream'], exam_words(files)): refused(cli(*words(base, files, tmp_path/'o', *more)), "vocabulary has 270 entries"); assert not (tmp_path/'o').exists()


@pytest.mark.parametrize('stream', [False, True])
def test_data_that_was_replaced_is_noticed(stream, checkpoint, files, cli, tmp_path):
    data, more = tmp_path/'d'/'x.jsonl', ['--stream'] * stream
    data.parent.mkdir(); shutil.copy(files/'a.jsonl', data)
    go = lambda *also: cli(*words(checkpoint(), data.parent, tmp_path/'o', *more, *also, data=['x.jsonl']))
    with stopping_at(3): go()
    write(data, make_texts(seed=7)); before = snapshot(tmp_path/'o')
    refused(go('--resume-from-checkpoint'), 'other content'); assert snapshot(tmp_path/'o') == before
    shutil.copy(files/'a.jsonl', data)
    assert go('--resume-from-checkpoint').code == 0


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_stream_that_breaks_goes_on_after_its_repair(workers, checkpoint, cli, tmp_path):
    whole = ''.join(json.dumps(dict(text=t)) + '\n' for t in make_texts(160, 200, seed=5)).encode()
    d, cut = tmp_path/'d', len(whole) // 2              # eighty documents, and then bytes that are no text
    d.mkdir(); (d/'a.jsonl').write_bytes(whole[:cut].rsplit(b'\n', 1)[0]); (d/'b.txt').write_text('the sea sings ' * 400)
    with open(d/'b.txt', 'ab') as f: f.write(b'\xff')
    go = lambda out, *more: cli(*words(checkpoint(), tmp_path, out, '--stream', '--dataloader-num-workers', workers, *more, data=['d'], max_steps=90))
    r = go(tmp_path/'o')
    refused(r, 'is not UTF-8'); assert 'steps are saved: go on with --resume-from-checkpoint' in r.err
    with open(d/'b.txt', 'r+b') as f: f.truncate(14 * 400)
    r = go(tmp_path/'o', '--resume-from-checkpoint')
    assert r.code == 0, r.err
    assert go(tmp_path/'p').code == 0
    assert_same(tmp_path/'o', tmp_path/'p')


def test_memory_or_space_that_ends_in_an_exam_loses_nothing(checkpoint, files, cli, tmp_path):
    go = lambda out, *more: cli(*words(checkpoint(), files, out, *exam_words(files), '--load-best-model-at-end', *more))
    assert go(tmp_path/'whole').code == 0
    def raising(e): return lambda real, *a, **k: (_ for _ in ()).throw(e)
    for name, broken, error, says in (('m', 'keys_found', torch.OutOfMemoryError('CUDA out of memory.'), 'in the exam after step 2'), ('d', 'save_file', OSError(28, 'No space left on device'), 'best weights could not be written')):
        with replaced(watch, broken, raising(error)): r = go(tmp_path/name)
        refused(r, says); assert 'The first 2 steps are saved' in r.err and not list((tmp_path/name).glob('.best*'))
        assert go(tmp_path/name, '--resume-from-checkpoint').code == 0
        assert_same(tmp_path/'whole', tmp_path/name)


def test_a_full_disk_is_one_sentence(checkpoint, files, cli, tmp_path):
    import resource
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try: r = cli(*words(checkpoint(), files, tmp_path/'o', *exam_words(files), '--load-best-model-at-end'))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before); signal.signal(signal.SIGXFSZ, old)
    refused(r, 'best weights could not be written'); assert 'start again in a new folder' in r.err
    assert sorted(p.name for p in (tmp_path/'o').iterdir()) == ['pose_nb.json', 'train_log.jsonl']
    refused(cli(*words(checkpoint(), files, tmp_path/'o', *exam_words(files), '--load-best-model-at-end', '--resume-from-checkpoint')), 'ended before its first checkpoint')


def test_a_signal_during_an_exam_stops_after_it(checkpoint, files, cli, tmp_path):
    with replaced(watch, 'keys_found', lambda real, *a: (signal.raise_signal(signal.SIGTERM), real(*a))[1]): r = cli(*words(checkpoint(), files, tmp_path/'o', *exam_words(files)))
    assert r.code == 143 and 'stopped after step 2' in r.err and 'eval_passkey' in read_log(tmp_path/'o')[-1] and checkpoints(tmp_path/'o')


def test_a_killed_worker_is_one_sentence(checkpoint, files, cli, tmp_path):
    import multiprocessing
    kill = lambda real, *a: (os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL) if a[-1] == 3 else None, real(*a))[1]
    with replaced(pt, 'train_step', kill): r = cli(*words(checkpoint(), files, tmp_path/'o', '--dataloader-num-workers', '1', max_steps=400))
    refused(r, 'a process that draws windows')


def test_two_runs_do_not_share_a_folder(checkpoint, files, cli, tmp_path):
    "The second one starts while the first one reads its data, and the folder is still empty."
    import pose_nb.workflow as wf
    out, said = tmp_path/'o', []
    def second(real, *a, **k):
        if not said:
            said.append(None)
            with pytest.raises(PoseError, match='another run is writing'): extend(checkpoint(), TARGET, files/'a.jsonl', out, max_steps=1, progress=False)
        return real(*a, **k)
    with replaced(wf, 'run_data', second): assert cli(*words(checkpoint(), files, out)).code == 0
    assert said and [r['step'] for r in read_log(out)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_inside_the_data_and_a_cache_that_is_only_read(checkpoint, files, cli, tmp_path, monkeypatch):
    import pose_nb.sources as sources
    data = tmp_path/'data'; data.mkdir(); shutil.copy(files/'a.jsonl', data)
    refused(cli(*words(checkpoint(), tmp_path, data/'out', data=['data'])), 'lies in the data folder'); assert not (data/'out').exists()
    assert cli(*words(checkpoint(), files, tmp_path/'first', max_steps=1)).code == 0
    def denied(*a): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(sources, 'FileLock', denied)
    assert cli(*words(checkpoint(), files, tmp_path/'second', max_steps=1)).code == 0
    write(tmp_path/'new.jsonl', make_texts(5, seed=8))
    refused(cli(*words(checkpoint(), tmp_path, tmp_path/'third', data=['new.jsonl'])), 'POSE_NB_CACHE'); assert not (tmp_path/'third').exists()


def test_the_reason_is_told_where_a_folder_cannot_be_removed(checkpoint, files, cli, tmp_path, monkeypatch):
    from pathlib import Path
    monkeypatch.setattr(Path, 'rmdir', lambda p: (_ for _ in ()).throw(PermissionError(13, 'Permission denied', str(p))))
    refused(cli(*words(checkpoint(), files, tmp_path/'o', '--eval-steps', '2')), 'name them with --eval-data')


def test_resuming_without_an_option_of_the_plan_is_refused(checkpoint, corpus, cli, tmp_path):
    words = extend_args(checkpoint(), corpus.jsonl, tmp_path/'out', max_steps=4, save_steps=1)
    assert cli(*words, '--lora-r', '2').code == 0
    r = cli(*words, '--resume-from-checkpoint')
    assert r.code == 2 and 'another plan' in r.err and 'lora was' in r.err and 'Traceback' not in r.err, r.err


def test_only_whole_words_name_a_gpu(monkeypatch):
    import torch
    from pose_nb.watch import PEAK, peak_flops
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for name, want in {'NVIDIA H100 80GB HBM3': PEAK['H100'], 'NVIDIA A100-SXM4-80GB': PEAK['A100'], 'NVIDIA L40': 0., 'NVIDIA L40S': PEAK['L40S'], 'NVIDIA GeForce RTX 4090': PEAK['RTX 4090']}.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda name=name: name)
        assert peak_flops() == want, name
