"""The same run in one process and in two, with the shipped configuration files and the command that a user types.

Processes here are CPU processes that talk through gloo. On GPUs the commands are the same: accelerate launch --config_file configs/accelerate/fsdp2.yaml -m pose_nb.cli extend ...
"""
import json, os, shutil, signal, socket, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path

import psutil, pytest, torch
from conftest import extend_args, snapshot
from safetensors.torch import load_file

from pose_nb.checkpoint import checkpoints, verify_checkpoint
from pose_nb.train import read_log

ROOT = Path(__file__).parents[1]
deepspeed = pytest.mark.skipif(not (find_spec('deepspeed') and shutil.which('g++')), reason='DeepSpeed compiles a part of itself: needs pip install pose_nb[deepspeed] and g++')
ENGINES = ['ddp', 'fsdp2', pytest.param('deepspeed_zero3', marks=deepspeed), pytest.param('deepspeed_zero3_offload', marks=deepspeed)]


def words(checkpoint, corpus, out, batch=2, **kw): return extend_args(checkpoint(), corpus.jsonl, out, **dict(max_steps=6, per_device_train_batch_size=batch, no_progress=True, save_steps=2) | kw)


def launch(config, args, processes=2):
    "Start the command in several processes."
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    line = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'configs'/'accelerate'/f'{config}.yaml', '--num_processes', processes, '--main_process_port', port, '-m', 'pose_nb.cli', *args]
    return subprocess.Popen([str(w) for w in line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(job, timeout=300):
    try: out, _ = job.communicate(timeout=timeout)
    finally: job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    return out


def run(config, args, processes=2):
    job = launch(config, args, processes)
    out = finish(job)
    assert job.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope='module')
def alone(checkpoint, corpus, tmp_path_factory):
    "The folder of the run in one process."
    from pose_nb.cli import main
    out = tmp_path_factory.mktemp('alone')/'out'
    assert main(words(checkpoint, corpus, out)) == 0
    return out


def losses(out): return [r['loss'] for r in read_log(out)]


def assert_close(out, alone):
    a, b = load_file(out/'model.safetensors'), load_file(alone/'model.safetensors')
    assert a.keys() == b.keys()
    for n in a: assert torch.allclose(a[n], b[n], atol=2e-5), n
    assert len(losses(out)) == len(losses(alone)) and max(abs(x - y) for x, y in zip(losses(out), losses(alone))) < 1e-5


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('config', ENGINES)
def test_two_processes_give_the_losses_and_weights_of_one(config, accumulate, alone, checkpoint, corpus, tmp_path):
    if accumulate == 2 and config.endswith('offload'): pytest.skip('as without offload')
    out, whole = tmp_path/'out', alone
    if accumulate == 2:
        from pose_nb.cli import main
        whole = tmp_path/'whole'
        assert main(words(checkpoint, corpus, whole, batch=4)) == 0
    seen = run(config, words(checkpoint, corpus, out, batch=1, gradient_accumulation_steps=accumulate))
    assert_close(out, whole)
    assert seen.count('status: done') == 1, 'one process speaks for all'
    r = json.loads((out/'pose_nb.json').read_text())
    assert r['processes'] == 2 and r['engine'] == {'ddp': 'whole', 'fsdp2': 'fsdp'}.get(config, 'deepspeed')
    assert [p.name for p in out.glob('*.safetensors')] == ['model.safetensors'] and (out/'config.json').exists()
    assert snapshot(out)['config.json'] == snapshot(whole)['config.json']


def killed(config, args, out, processes=2, after=3):
    "Kill -9 all processes once the log shows some steps."
    job, t0 = launch(config, args, processes), time.time()
    while len(read_log(out)) < after or not checkpoints(out):
        assert job.poll() is None and time.time() - t0 < 250, finish(job)
        time.sleep(.005)
    everyone = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for p in everyone: p.kill()
    psutil.wait_procs(everyone)
    job.communicate()


@pytest.mark.parametrize('config', ENGINES[:3])
def test_killed_and_resumed_gives_the_same_bits_in_two_processes(config, checkpoint, corpus, tmp_path):
    args = lambda out, *more: [*words(checkpoint, corpus, out, batch=1, max_steps=60, save_steps=1), '--save-total-limit', '2', *more]
    whole, parts = tmp_path/'whole', tmp_path/'parts'
    run(config, args(whole))
    killed(config, args(parts), parts)
    assert all(verify_checkpoint(p) for p in checkpoints(parts)) and not (parts/'config.json').exists()
    run(config, args(parts, '--resume-from-checkpoint'))
    assert losses(parts) == losses(whole)
    a, b = load_file(parts/'model.safetensors'), load_file(whole/'model.safetensors')
    for n in a: assert torch.equal(a[n], b[n]), n


def test_a_run_of_two_processes_goes_on_in_one_with_the_same_examples(checkpoint, corpus, alone, cli, tmp_path):
    out, args = tmp_path/'out', words(checkpoint, corpus, tmp_path/'out', batch=1)
    run('ddp', args)
    shutil.rmtree(out/'checkpoint-4'); (out/'config.json').unlink()
    r = cli(*args, '--resume-from-checkpoint')
    assert r.code == 2 and 'read 1 windows' in r.err and 'read 2' in r.err and '--gradient-accumulation-steps' in r.err, r.err
    assert cli(*words(checkpoint, corpus, out, batch=2), '--resume-from-checkpoint').code == 0
    assert_close(out, alone)


def test_fsdp_goes_on_with_another_number_of_processes_and_not_in_one_piece(checkpoint, corpus, cli, tmp_path):
    from pose_nb.cli import main
    whole, out = tmp_path/'whole', tmp_path/'out'
    assert main(words(checkpoint, corpus, whole, batch=4)) == 0
    run('fsdp2', words(checkpoint, corpus, out, batch=2))
    shutil.rmtree(out/'checkpoint-4'); (out/'config.json').unlink()
    r = cli(*words(checkpoint, corpus, out, batch=4), '--resume-from-checkpoint')
    assert r.code == 2 and "written by the engine 'fsdp' and this run uses 'whole'" in r.err, r.err
    run('fsdp2', [*words(checkpoint, corpus, out, batch=1), '--resume-from-checkpoint'], processes=4)
    assert_close(out, whole)


@deepspeed
def test_deepspeed_refuses_another_number_of_processes(checkpoint, corpus, tmp_path):
    out = tmp_path/'out'
    run('deepspeed_zero3', words(checkpoint, corpus, out, batch=1))
    (out/'config.json').unlink()
    job = launch('deepspeed_zero3', [*words(checkpoint, corpus, out, batch=2), '--resume-from-checkpoint'], processes=1)
    assert 'resume with 2 processes' in finish(job) and job.returncode != 0


def test_sigterm_reaches_all_processes_and_the_run_can_go_on(checkpoint, corpus, tmp_path):
    out, args = tmp_path/'out', words(checkpoint, corpus, tmp_path/'out', batch=1, max_steps=2000, save_steps=0)
    job, t0 = launch('ddp', args), time.time()
    while len(read_log(out)) < 3:
        assert job.poll() is None and time.time() - t0 < 200, finish(job)
        time.sleep(.01)
    job.send_signal(signal.SIGTERM)      # as a cluster does it: to the launcher
    seen = finish(job)
    assert job.returncode != 0 and len(checkpoints(out)) == 1 and verify_checkpoint(checkpoints(out)[-1])['step'] >= 3, seen[-2000:]
    assert json.loads((out/'pose_nb.json').read_text())['status'] == 'stopped'


def test_a_mistake_is_said_once(checkpoint, corpus, tmp_path):
    job = launch('ddp', words(checkpoint, corpus, tmp_path/'out', batch=1, target=32))
    out = finish(job)
    assert job.returncode != 0 and out.count('is not longer than the window') == 1, out
