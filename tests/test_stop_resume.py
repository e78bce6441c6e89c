"A run that is stopped, or killed, goes on where it was and ends with the same bits."
import os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from conftest import command, extend_args, snapshot, start
from safetensors.torch import load_file

from pose_nb.checkpoint import checkpoints, verify_checkpoint
from pose_nb.train import read_log
from pose_nb.workflow import extend

STEPS = 150


@pytest.fixture(scope='module')
def base(checkpoint): return checkpoint(attention_dropout=.1)     # dropout, so that resuming has random states to restore


def args(base, corpus, out, **kw): return extend_args(base, corpus.jsonl, out, **dict(max_steps=STEPS, warmup_steps=5) | kw)


def weights(out): return load_file(Path(out)/'model.safetensors')


def assert_same(a, b):
    assert a.keys() == b.keys()
    for n in a: assert torch.equal(a[n], b[n]), n


@pytest.fixture(scope='module')
def uninterrupted(base, corpus, tmp_path_factory):
    "The folder of the run that nobody stopped."
    from pose_nb.cli import main
    out = tmp_path_factory.mktemp('whole')/'out'
    assert main(args(base, corpus, out)) == 0
    return out


def stop_with(number, words, out, after=5):
    "Start a run, wait until its log shows some steps, send a signal. -> code, stdout, stderr"
    job, t0 = start(*words), time.time()
    while len(read_log(out)) < after:
        assert job.poll() is None and time.time() - t0 < 200, job.communicate()
        time.sleep(.01)
    job.send_signal(number)
    return (*job.communicate(timeout=100), job.returncode)


def test_ctrl_c_prints_the_command_that_finishes_with_equal_bits(base, corpus, uninterrupted, tmp_path):
    out = tmp_path/'an output with spaces é'
    stdout, stderr, code = stop_with(signal.SIGINT, args(base, corpus, out), out)
    assert code == 130 and 'Traceback' not in stderr
    step = verify_checkpoint(checkpoints(out)[-1])['step']
    assert 5 <= step < STEPS and f'stopped after step {step}' in stderr
    printed = stderr.strip().splitlines()[-1].strip()
    assert printed.startswith('pose_nb extend ') and '--resume-from-checkpoint' in printed
    r = subprocess.run(printed, shell=True, capture_output=True, text=True, env=os.environ | {'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert r.returncode == 0, r.stderr
    assert_same(weights(out), weights(uninterrupted))
    assert [x['loss'] for x in read_log(out)] == [x['loss'] for x in read_log(uninterrupted)]


def test_sigterm_stops_like_ctrl_c(base, corpus, uninterrupted, cli, tmp_path):
    words = args(base, corpus, tmp_path/'o')
    _, stderr, code = stop_with(signal.SIGTERM, words, tmp_path/'o')
    assert code == 143 and 'continue with' in stderr
    assert cli(*words, '--resume-from-checkpoint', '--dataloader-num-workers', '2').code == 0     # workers change nothing
    assert_same(weights(tmp_path/'o'), weights(uninterrupted))


def test_sigkill_leaves_only_whole_checkpoints(base, corpus, uninterrupted, cli, tmp_path):
    words = args(base, corpus, tmp_path/'o', save_steps=1, save_total_limit=2)      # nearly always saving when killed
    stop_with(signal.SIGKILL, words, tmp_path/'o')
    found = checkpoints(tmp_path/'o')
    assert found and all(verify_checkpoint(p) for p in found)
    assert not (tmp_path/'o'/'config.json').exists(), 'an unfinished run does not look like a model'
    words[words.index('--save-steps') + 1] = '0'
    r = cli(*words, '--resume-from-checkpoint')
    assert r.code == 0, r.err
    assert_same(weights(tmp_path/'o'), weights(uninterrupted))
    assert not [p.name for p in (tmp_path/'o').glob('.checkpoint*')], 'what the killed run left is cleared'


@pytest.fixture(scope='module')
def stopped(base, corpus, tmp_path_factory):
    "A run that stopped after two of four steps; copy it before use."
    out = tmp_path_factory.mktemp('stopped')/'out'
    interrupt_after(2, base, corpus, out)
    return out


def interrupt_after(steps, model, corpus, out, **kw):
    "Run `extend` in this process; a Ctrl-C arrives in the middle of a step."
    import pose_nb.train as t
    real = t.train_step
    def step(*a):
        if a[-1] == steps - 1: signal.raise_signal(signal.SIGINT)
        return real(*a)
    t.train_step = step
    try: r = extend(model, data=corpus.jsonl, output_dir=out, progress=False, **dict(target=256, max_steps=4, learning_rate=1e-3, warmup_steps=1) | kw)
    finally: t.train_step = real
    assert r['status'] == 'stopped' and r['result']['steps'] == steps


@pytest.mark.parametrize('change', [dict(learning_rate='2e-3'), dict(seed='1'), dict(max_steps='5'), dict(target='512'), dict(window='32'), dict(chunks='3'), dict(scaling='linear'), dict(no_bos=True)],
                         ids=lambda c: next(iter(c)))
def test_resume_with_other_settings_is_refused_and_changes_nothing(change, base, corpus, stopped, cli, tmp_path):
    out = shutil.copytree(stopped, tmp_path/'o')
    before = snapshot(out)
    words = extend_args(base, corpus.jsonl, out, **dict(max_steps=4, resume_from_checkpoint='latest') | change)
    r = cli(*words)
    assert r.code == 2 and ('other settings' in r.err or 'another plan' in r.err), r.err
    assert snapshot(out) == before


@pytest.mark.parametrize('kw', [dict(bf16=True), dict(gradient_checkpointing=True), dict(dataloader_num_workers=2), dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
                                dict(passkey_share=.5, window=256, target=512), dict(sampler='e2llm', scaling='linear', gradient_checkpointing=True), dict(sampler='pose_even', dataloader_num_workers=1),
                                dict(sampler='turns', sampler_kwargs=dict(split_ids='Ġwind'))], ids=lambda k: next(iter(k)))
def test_every_kind_of_run_resumes_with_equal_bits(kw, checkpoint, base, corpus, tmp_path):
    model = checkpoint(max_position_embeddings=256, attention_dropout=.1) if 'window' in kw else base
    options = dict(target=256, max_steps=4, learning_rate=1e-3, warmup_steps=1) | kw
    extend(model, data=corpus.jsonl, output_dir=tmp_path/'a', progress=False, **options)
    interrupt_after(2, model, corpus, tmp_path/'b', **options)
    extend(model, data=corpus.jsonl, output_dir=tmp_path/'b', progress=False, resume_from_checkpoint='latest', **options)
    assert_same(weights(tmp_path/'a'), weights(tmp_path/'b'))


def test_a_checkpoint_by_name_and_an_older_one(base, corpus, uninterrupted, cli, tmp_path):
    words = extend_args(base, corpus.jsonl, tmp_path/'o', max_steps=4, save_steps=1, save_total_limit=9)
    assert cli(*words).code == 0
    want = weights(tmp_path/'o')
    assert [p.name for p in checkpoints(tmp_path/'o')] == ['checkpoint-1', 'checkpoint-2', 'checkpoint-3']
    assert cli(*words, '--resume-from-checkpoint', tmp_path/'o'/'checkpoint-2').code == 0
    assert_same(want, weights(tmp_path/'o'))
    assert [r['step'] for r in read_log(tmp_path/'o')] == [1, 2, 3, 4]


@pytest.mark.parametrize('words', [['--scaling', 'dynamic'], ['--scaling', 'longrope', '--scaling-kwargs', '{"long_factor": [1,1.2,1.5,2,2.5,3,3.5,4], "short_factor": [1,1,1,1,1,1,1,1.1]}']], ids=['dynamic', 'longrope'])
def test_schemes_that_look_at_the_input_resume_too(words, base, corpus, cli, tmp_path):
    "Training holds the frequencies of the full length; a checkpoint taken in between must not change that."
    whole, parts = tmp_path/'whole', tmp_path/'parts'
    assert cli(*args(base, corpus, whole), *words).code == 0
    _, stderr, code = stop_with(signal.SIGINT, args(base, corpus, parts) + words, parts)
    assert code == 130, stderr
    assert cli(*args(base, corpus, parts), *words, '--resume-from-checkpoint').code == 0
    assert_same(weights(parts), weights(whole))
    assert (parts/'config.json').read_text() == (whole/'config.json').read_text()
