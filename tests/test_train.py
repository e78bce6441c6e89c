"The training loop computes what a textbook loop computes, however the work is sliced, batched or spread."
import os, shutil, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from conftest import make_model, make_texts, make_tokenizer
from hypothesis import given, settings as hypothesis_settings, strategies as st

from pose_nb.common import PoseError
from pose_nb.data import WindowDataset, collate, tokenize
from pose_nb.model import set_scaling
from pose_nb.interpolation import YaRN
from pose_nb.positions import PoSE
from pose_nb.train import LossModel, TrainSettings, chunked_loss, head_guard, label_weight, memory_advice, step_indices, train

KINDS = ('llama', 'mistral', 'qwen2')
SETTINGS = TrainSettings(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1)


def dataset(): return WindowDataset(tokenize(make_texts(), make_tokenizer(), progress=False), PoSE(64, 256), seed=0, bos=0)
def model(**kw): return set_scaling(make_model(**kw), YaRN(4.), 256)
def losses(result): return [r['loss'] for r in result.history]
def gradients(m): return {n: p.grad.clone() for n, p in m.named_parameters()}


@pytest.mark.parametrize('chunk', [1, 7, 63, 64, 1000])
@pytest.mark.parametrize('kind', KINDS)
def test_sliced_loss_is_the_models_own_loss_with_its_gradients(kind, chunk):
    batch, m = collate([dataset()[i] for i in range(2)]), make_model(kind).train()
    n = (batch['labels'][:, 1:] != -100).sum()
    own = m(**{k: v for k, v in batch.items() if k != 'loss_weights'}, use_cache=False).loss
    own.backward(); want = gradients(m); m.zero_grad()
    loss = LossModel(m, chunk)(batch) / n
    loss.backward()
    assert label_weight(batch) == n and abs(loss - own) < 1e-5
    for k, g in gradients(m).items(): assert torch.allclose(g, want[k], atol=1e-6, rtol=1e-4), k


@hypothesis_settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(1, 50), st.integers(0, 10**6))
def test_weights_and_masked_labels_count_as_in_the_textbook(rows, window, chunk, seed):
    torch.manual_seed(seed)
    hidden, head = torch.randn(rows, window, 8, requires_grad=True), torch.nn.Linear(8, 11)
    labels, w = torch.randint(0, 11, (rows, window)), torch.rand(rows, window)
    labels[torch.rand(rows, window) < .3] = -100; w[torch.rand(rows, window) < .3] = 0
    p = head(hidden)[:, :-1].log_softmax(-1)
    want = -sum(w[i, t + 1] * p[i, t, labels[i, t + 1]] for i in range(rows) for t in range(window - 1) if labels[i, t + 1] != -100)
    got = chunked_loss(hidden, head, labels, w, chunk)
    assert torch.allclose(got, torch.as_tensor(want, dtype=torch.float32), atol=1e-4)
    if torch.is_tensor(want): assert torch.allclose(*(torch.autograd.grad(x, hidden)[0] for x in (got, want)), atol=1e-5)


def test_sliced_loss_trains_the_head_in_bf16_autocast_too():
    batch, m = collate([dataset()[0]]), make_model().train()
    with torch.autocast('cpu', torch.bfloat16): LossModel(m, 16)(batch).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in m.parameters())


@pytest.mark.parametrize('batch,accumulate', [(2, 2), (1, 4)])
def test_accumulation_equals_one_large_batch(batch, accumulate):
    one = train(a := model(), dataset(), SETTINGS, progress=False)
    many = train(b := model(), dataset(), replace(SETTINGS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate), progress=False)
    assert max(abs(x - y) for x, y in zip(losses(one), losses(many))) < 1e-5
    for (n, p), q in zip(a.named_parameters(), b.parameters()): assert torch.allclose(p, q, atol=2e-5), n


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_every_split_of_a_step_reads_the_same_examples(b, a, world, step):
    s = TrainSettings(per_device_train_batch_size=b, gradient_accumulation_steps=a)
    read = sorted(i for m in range(a) for r in range(world) for i in step_indices(step, m, s, r, world))
    assert read == list(range(step * a * b * world, (step + 1) * a * b * world))


WORKER = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_train import SETTINGS, dataset, losses, model, train
from accelerate import PartialState
r = train(m := model(), dataset(), replace(SETTINGS, per_device_train_batch_size=2, save_steps=2), sys.argv[2], progress=False)
if PartialState().is_main_process:
    torch.save(dict(world=PartialState().num_processes, losses=losses(r), tokens=r.tokens, weights={n: p.detach() for n, p in m.named_parameters()}), sys.argv[2] + '/seen.pt')
from pose_nb.engines import leave
leave(0)
"""

def two_processes(tmp_path):
    "The training loop in two CPU processes, as torchrun starts them."
    (tmp_path/'worker.py').write_text(WORKER)
    words = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(tmp_path/'worker.py'), str(Path(__file__).parent), str(tmp_path/'run')]
    job = subprocess.Popen(words, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = job.communicate(timeout=150)
    finally: job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, out[-3000:]
    return torch.load(tmp_path/'run'/'seen.pt')


def test_two_processes_train_as_one(tmp_path):
    seen, alone = two_processes(tmp_path), train(m := model(), dataset(), SETTINGS, progress=False)
    assert seen['world'] == 2 and seen['tokens'] == alone.tokens
    assert max(abs(x - y) for x, y in zip(seen['losses'], losses(alone))) < 1e-5
    for n, p in m.named_parameters(): assert torch.allclose(p, seen['weights'][n], atol=2e-5), n
    # what two processes saved, one can resume
    r = train(model(), dataset(), SETTINGS, tmp_path/'run', resume=tmp_path/'run'/'checkpoint-2', progress=False)
    assert r.step == 4 and max(abs(x - y) for x, y in zip(losses(r), losses(alone))) < 1e-5


def test_bf16_runs_on_a_cpu_and_keeps_float32_weights():
    r = train(m := model(), dataset(), replace(SETTINGS, bf16=True, max_steps=2), progress=False)
    exact = train(model(), dataset(), replace(SETTINGS, max_steps=2), progress=False)
    assert all(p.dtype == torch.float32 for p in m.parameters())
    assert max(abs(x - y) for x, y in zip(losses(r), losses(exact))) < .05 and losses(r) != losses(exact)


@pytest.mark.parametrize('kw', [dict(gradient_checkpointing=True), dict(dataloader_num_workers=2), dict(loss_chunk=5)], ids=lambda k: next(iter(k)))
def test_how_it_is_computed_does_not_change_what_is_computed(kw):
    a, b = (train(model(), dataset(), s, progress=False) for s in (SETTINGS, replace(SETTINGS, **kw)))
    assert max(abs(x - y) for x, y in zip(losses(a), losses(b))) < 1e-5


def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_two_seeds_differ():
    a, b = model(), model()
    assert losses(train(a, dataset(), SETTINGS, progress=False)) == losses(train(b, dataset(), SETTINGS, progress=False))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_model_that_changes_its_logits_is_refused():
    m, batch = model(), collate([dataset()[0]])
    head_guard(LossModel(m), batch)
    loss_model = LossModel(m)
    m.get_output_embeddings = lambda head=m.lm_head: head
    m.lm_head = torch.nn.Sequential(m.lm_head, torch.nn.Tanh())      # after the head that the loss uses, as Gemma 2's soft cap is
    with pytest.raises(PoseError, match='post-processes its logits'): head_guard(loss_model, batch)


@pytest.mark.parametrize('kind', ['gemma2', 'cohere', 'granite', 'hyperclovax', 'minicpm3', 'falcon_h1', 'nanochat'])
def test_the_loss_in_slices_is_that_of_models_that_scale_or_squash_their_logits(kind):
    from pose_nb.architectures import loss_in_slices, tiny_config
    from pose_nb.train import logits_head
    from transformers import AutoModelForCausalLM
    config = tiny_config(kind)
    for name, value in dict(final_logit_softcapping=2., logit_scale=.3, logits_scaling=5., lm_head_multiplier=.4).items():
        if hasattr(config, name) and kind != 'minicpm3': setattr(config, name, value)       # there it is derived
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert loss_in_slices(model) == ''
    plain = model.get_output_embeddings()
    hidden = torch.randn(3, plain.in_features)
    assert not torch.allclose(logits_head(model)(hidden), plain(hidden)), 'something is done to the logits'


def test_liger_gives_the_same_loss_and_gradients():
    "On a CPU through Triton's interpreter, in a process of its own since Triton reads the switch once: pip install liger-kernel triton."
    pytest.importorskip('liger_kernel')
    code = """
from test_train import *
from pose_nb.train import can_use_liger
a, b = (LossModel(model(), liger=l) for l in (False, True))
batch = collate([dataset()[i] for i in range(2)])
assert can_use_liger(a.model)
for m in (a, b): m(batch).backward()
assert abs(a(batch) - b(batch)) < 1e-3
for k, g in gradients(a).items(): assert torch.allclose(g, gradients(b)[k], atol=1e-4, rtol=1e-4), k
batch['loss_weights'] = batch['loss_weights'] * 2
assert torch.equal(a(batch), b(batch)), 'other weights than 0 and 1 take the loss in slices'
"""
    r = subprocess.run([sys.executable, '-c', code], env=os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on a CPU')
def test_a_compiled_model_trains_the_same():
    a, b = (train(model(), dataset(), replace(SETTINGS, max_steps=2, torch_compile=c), progress=False) for c in (False, True))
    assert max(abs(x - y) for x, y in zip(losses(a), losses(b))) < 1e-5


def test_what_to_try_when_memory_runs_out_gets_dearer_step_by_step():
    s, said = TrainSettings(per_device_train_batch_size=6, loss_chunk=1024), []
    for change in (dict(per_device_train_batch_size=3, gradient_accumulation_steps=2), dict(per_device_train_batch_size=1, gradient_accumulation_steps=6), dict(gradient_checkpointing=True), dict(loss_chunk=256), dict(loss_chunk=128), dict(bf16=True)):
        said.append(memory_advice(s))
        for k, v in change.items(): assert f"--{k.replace('_', '-')}{'' if v is True else f' {v}'}" in said[-1]
        assert ('same result' in said[-1]) != ('bf16' in change)
        s = replace(s, **change)
    assert '--lora-r' in memory_advice(s) and 'configs/accelerate' in memory_advice(s)
