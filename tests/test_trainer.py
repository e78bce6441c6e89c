"transformers' Trainer and TRL's SFTTrainer train what our loop trains, resume exactly, and are stopped where positions would be lost."
import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from conftest import make_model, make_texts, make_tokenizer
from hypothesis import given, settings as hypothesis_settings, strategies as st
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from pose_nb.common import PoseError
from pose_nb.data import GeneratedDataset, WindowDataset, tokenize
from pose_nb.doctor import intended
from pose_nb.interpolation import Linear, YaRN
from pose_nb.model import cast_weights, set_scaling
from pose_nb.positions import PoSE, RandPos
from pose_nb.samplers import CREAM, E2LLM, EvenPoSE, Turns
from pose_nb.train import TrainSettings, train
from pose_nb.trainer import PoSECallback, PoSECollator, RunView, check_batch, first_batch, pose_rows

SAMPLER, SCALING, BOS = PoSE(64, 256), YaRN(4.), 0


def store(): return tokenize(make_texts(), make_tokenizer(), progress=False)
def documents(n=12): return [dict(input_ids=store()[i].tolist()) for i in range(n)]
def rows(n=12): return pose_rows(documents(n), SAMPLER, BOS)[0]
def model(**kw): return set_scaling(make_model(**kw), SCALING, 256)
def weights(m): return {n: p.detach().clone() for n, p in m.named_parameters()}
def equal(a, b): return all(torch.equal(p, q) for p, q in zip(weights(a).values(), weights(b).values(), strict=True))
def distance(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))

COMMON = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1, adam_beta2=.95, logging_steps=1, save_strategy='no', report_to=[],
              disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, use_cpu=not torch.cuda.is_available())

def arguments(folder, **kw): return TrainingArguments(str(folder), **COMMON | kw)

def sft_arguments(folder, **kw):
    from trl import SFTConfig
    return SFTConfig(str(folder), **COMMON | dict(bf16=False, gradient_checkpointing=False, packing=False, padding_free=False, dataset_kwargs={'skip_prepare_dataset': True}) | kw)

def trainer(folder, kind=Trainer, model_=None, data=None, collator=None, callbacks=None, make=None, peft=None, **kw):
    "A Trainer or SFTTrainer with our collator and callback."
    make = make or (arguments if kind is Trainer else sft_arguments)
    extra = dict(peft_config=peft) if peft else {}
    t = kind(model=model_ or model(), args=make(folder, **kw), train_dataset=rows() if data is None else data, data_collator=collator or PoSECollator(SAMPLER, bos=BOS),
             callbacks=[PoSECallback(SCALING)] if callbacks is None else callbacks, processing_class=make_tokenizer(), **extra)
    t.remove_callback(PrinterCallback)
    return t

def sft():
    trl = pytest.importorskip('trl')
    return trl.SFTTrainer

def losses(t): return [h['loss'] for h in t.state.log_history if 'loss' in h]


# ── draws ──
@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(0, 11), st.sampled_from([SAMPLER, RandPos(64, 256), CREAM(64, 256), PoSE(64, 256, chunks=4), PoSE(64, 200, content='contiguous')]))
def test_a_window_depends_on_seed_epoch_and_row_number_alone(seed, epoch, i, sampler):
    r = CACHED[i]
    a, b = (PoSECollator(sampler, seed=seed, bos=BOS) for _ in range(2))
    np.random.seed(i); torch.manual_seed(i)
    one = a.example(r, epoch)
    np.random.rand(3); torch.rand(3); b.example(CACHED[0], epoch + 1)
    two = b.example(r, epoch)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (one['position_ids'].diff() > 0).all() and one['position_ids'].max() < sampler.target and one['attention_mask'].all()
    other = a.example(r, epoch + 1)
    assert not all(torch.equal(one[k], other[k]) for k in one)

CACHED = list(rows())


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.integers(1, 400), st.integers(300, 900))
def test_own_labels_are_cut_where_tokens_are(seed, masked, length):
    "Labels here are token + 1000, so that each names the token it belongs to."
    masked = min(masked, length - 20)
    ids = np.random.default_rng(seed).integers(2, 300, length)
    labels = np.where(np.arange(length) < masked, -100, ids + 1000)
    e = PoSECollator(SAMPLER, seed=seed, bos=BOS).example(dict(input_ids=ids, labels=labels, row_number=0), 0)
    seen = e['labels'] != -100
    seen[0] = False
    assert seen.any() and torch.equal(e['labels'][seen], e['input_ids'][seen] + 1000)


def test_a_short_answer_after_a_long_prompt_is_in_every_window():
    ids = np.random.default_rng(0).integers(2, 300, 20_000)
    labels = np.where(np.arange(len(ids)) < len(ids) - 30, -100, ids)
    c = PoSECollator(SAMPLER)
    for epoch in range(30): assert (c.example(dict(input_ids=ids, labels=labels, row_number=1), epoch)['labels'][1:] != -100).any()


def test_rows_are_counted_numbered_and_keep_their_numbers():
    data = documents(6) + [dict(input_ids=list(range(63))), dict(input_ids=list(range(62)))]
    kept, report = pose_rows(data, SAMPLER, BOS)
    assert report == dict(need=63, rows=8, used=7, short=1, uncut=0, untrained=0) and kept['row_number'] == list(range(7))
    again, _ = pose_rows(kept.shuffle(seed=1).select(range(3)), SAMPLER, BOS)
    assert again['row_number'] == kept.shuffle(seed=1)['row_number'][:3]
    labelled = [dict(input_ids=[2]*100, labels=[-100]*100), dict(input_ids=[2]*100, labels=[-100]*99 + [2])]
    assert pose_rows(labelled, SAMPLER)[1]['untrained'] == 1
    turns = [dict(input_ids=[2]*100), dict(input_ids=[2]*50 + [9] + [2]*50)]
    kept, report = pose_rows(turns, Turns(64, 256, (9,)))
    assert report['uncut'] == 1 and kept['row_number'] == [1]
    PoSECollator(Turns(64, 256, (9,))).example(kept[0], 0)


class Seen:
    "A collator that keeps what it returns, from any process."
    def __init__(self, inner, path): self.inner, self.path = inner, path
    def __call__(self, rows):
        b = self.inner(rows)
        with open(self.path, 'a') as f: f.write(json.dumps([[r['row_number'] for r in rows], self.inner.epoch, b['position_ids'].tolist()]) + '\n')
        return b

@pytest.mark.parametrize('workers,persistent', [(0, False), (2, False), (2, True)])
def test_the_epoch_reaches_data_workers(tmp_path, workers, persistent):
    inner = PoSECollator(SAMPLER, bos=BOS)
    call = PoSECallback(SCALING)
    call._set_epoch = lambda loader: inner.set_epoch(call._epoch)
    trainer(tmp_path, collator=Seen(inner, tmp_path/'seen'), callbacks=[call], max_steps=9, dataloader_num_workers=workers, dataloader_persistent_workers=persistent).train()
    seen = [json.loads(l) for l in (tmp_path/'seen').read_text().splitlines()][1:]      # the first is the guard's
    assert sorted(e for _, e, _ in seen) == [0]*3 + [1]*3 + [2]*3
    by_row = {r['row_number']: r for r in rows()}
    for numbers, epoch, positions in seen: assert positions == [inner.example(by_row[n], epoch)['position_ids'].tolist() for n in numbers]


# ── the same numbers ──
SETTINGS = TrainSettings(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1)

def windows(): return WindowDataset(store(), SAMPLER, seed=0, bos=BOS)

@pytest.mark.parametrize('accumulate', [1, 2])
def test_trainer_equals_our_loop_on_windows(tmp_path, accumulate):
    r = train(ours := model(), windows(), SETTINGS, progress=False)
    t = trainer(tmp_path, model_=(theirs := model()), data=RunView(windows(), 12), collator=default_data_collator, train_sampling_strategy='sequential',
                per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate)
    t.train()
    assert max(abs(a['loss'] - b) for a, b in zip(r.history, losses(t), strict=True)) < 1e-5
    assert distance(ours, theirs) < 2e-5 < distance(ours, model()) / 10


class Drawn:
    "The rows of a collator as an endless dataset for our loop."
    def __init__(self, collator, rows): self.collator, self.rows = collator, list(rows)
    def __getitem__(self, i): return self.collator.example(self.rows[i % len(self.rows)], i // len(self.rows))

@pytest.mark.parametrize('kind', ['Trainer', 'SFTTrainer'])
def test_trainers_equal_our_loop_on_rows_through_two_epochs(tmp_path, kind):
    kind = Trainer if kind == 'Trainer' else sft()
    data = pose_rows([d | dict(labels=[-100]*30 + d['input_ids'][30:]) for d in documents(8)], SAMPLER, BOS)[0]
    r = train(ours := model(), Drawn(PoSECollator(SAMPLER, bos=BOS), data), SETTINGS, progress=False)      # two steps an epoch, three steps
    t = trainer(tmp_path, kind, theirs := model(), data, train_sampling_strategy='sequential')
    t.train()
    assert max(abs(a['loss'] - b) for a, b in zip(r.history, losses(t), strict=True)) < 1e-5
    assert distance(ours, theirs) < 2e-5
    theirs.save_pretrained(tmp_path/'m')
    stock, ids = AutoModelForCausalLM.from_pretrained(tmp_path/'m').eval(), torch.arange(40)[None] + 5
    with torch.no_grad(): assert torch.equal(stock(ids, position_ids=ids + 200).logits, theirs.eval()(ids, position_ids=ids + 200).logits)


def test_loss_weights_of_zero_become_masked_labels_and_others_are_refused():
    def generate(weight): return lambda n, rng: (rng.integers(2, 300, n), np.where(np.arange(n) < 10, weight, 1).astype(np.float32))
    e = RunView(GeneratedDataset(generate(0), SAMPLER), 2)[0]
    assert (e['labels'][:10] == -100).all() and (e['labels'][10:] != -100).all() and 'loss_weights' not in e
    with pytest.raises(PoseError, match='loss weights other than 0 and 1'): RunView(GeneratedDataset(generate(.5), SAMPLER), 2)[0]
    view = RunView(windows(), 3)
    assert len(list(view)) == 3
    with pytest.raises(IndexError): view[3]


# ── stop and resume ──
def resumed(tmp_path, steps, stop, **kw):
    "Final models of one run in one piece, and of the same run resumed."
    dropout = dict(attention_dropout=.1)
    whole = trainer(tmp_path, model_=model(**dropout), max_steps=steps, save_strategy='steps', save_steps=stop, **kw)
    whole.train()
    torch.manual_seed(99); np.random.seed(99)
    second = trainer(tmp_path, model_=model(**dropout), max_steps=steps, **kw)
    second.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{stop}'))
    assert second.state.global_step == steps and losses(whole) == losses(second)
    return whole.model, second.model

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('steps,stop', [(3, 2), (6, 3), (7, 5)], ids=['mid-epoch', 'between', 'epoch 2'])
def test_a_resumed_trainer_is_bit_equal(tmp_path, workers, steps, stop):
    assert equal(*resumed(tmp_path, steps, stop, dataloader_num_workers=workers))

@pytest.mark.parametrize('kw', [dict(gradient_accumulation_steps=3, per_device_train_batch_size=2), dict(bf16=True, gradient_checkpointing=True), dict(train_sampling_strategy='sequential'),
                                dict(dataloader_num_workers=2, dataloader_persistent_workers=True)], ids=lambda k: next(iter(k)))
def test_resuming_in_epoch_2_is_bit_equal_in_every_setting(tmp_path, kw):
    assert equal(*resumed(tmp_path, 5, 4 if 'gradient_accumulation_steps' not in kw else 3, **kw))

def test_a_resumed_sft_trainer_is_bit_equal(tmp_path): assert equal(*resumed(tmp_path, 5, 4, kind=sft()))

def test_a_resumed_view_is_bit_equal_beyond_the_first_epoch_of_its_data(tmp_path):
    data = windows()
    n, steps = len(data), len(data) // 16 + 4
    assert equal(*resumed(tmp_path, steps, steps - 2, data=RunView(data, steps * 16), collator=default_data_collator, per_device_train_batch_size=16)) and steps * 16 > n + 16

def test_draws_from_global_random_state_do_not_resume(tmp_path):
    def naive(rows): return PoSECollator(SAMPLER, seed=int(np.random.randint(2**31)), bos=BOS)
    def call(rows): c = naive(rows); c.set_epoch(0); return c(rows)
    whole = trainer(tmp_path, collator=call, max_steps=3, save_strategy='steps', save_steps=2); whole.train()
    second = trainer(tmp_path, collator=call, max_steps=3); second.train(resume_from_checkpoint=str(tmp_path/'checkpoint-2'))
    assert not equal(whole.model, second.model)

def test_a_run_with_other_draws_does_not_resume(tmp_path):
    trainer(tmp_path, save_strategy='steps', save_steps=2).train()
    for c in (PoSECollator(SAMPLER, seed=1, bos=BOS), PoSECollator(PoSE(64, 200), bos=BOS)):
        with pytest.raises(PoseError, match='belongs to a run with other draws'): trainer(tmp_path, collator=c).train(resume_from_checkpoint=str(tmp_path/'checkpoint-2'))
    with pytest.raises(PoseError, match='rows was 12 and is now 8'): trainer(tmp_path, data=rows(8)).train(resume_from_checkpoint=str(tmp_path/'checkpoint-2'))

def test_a_checkpoint_holds_a_record_that_the_doctor_reads(tmp_path):
    trainer(tmp_path, save_strategy='steps', save_steps=2, callbacks=[PoSECallback(SCALING, dict(note='mine'))]).train()
    record = json.loads((tmp_path/'checkpoint-2'/'pose_nb.json').read_text())
    assert record['step'] == 2 and record['note'] == 'mine' and record['draws']['seed'] == 0 and record['draws']['scaling'] == repr(SCALING) and record['environment']['transformers']
    found = intended(tmp_path/'checkpoint-2')
    assert found.scaling == SCALING and found.target == 256 and 'pose_nb.json' in repr(found)


# ── adapters, precision, processes ──
@pytest.mark.parametrize('kind', ['Trainer', 'SFTTrainer'])
def test_lora_trains_resumes_and_merges(tmp_path, kind):
    peft = pytest.importorskip('peft')
    kind = Trainer if kind == 'Trainer' else sft()
    lora = peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM', lora_dropout=.1)
    def make(**kw):
        torch.manual_seed(1)
        return trainer(tmp_path, kind, peft.get_peft_model(model(), lora), max_steps=5, **kw)
    whole = make(save_strategy='steps', save_steps=4); whole.train()
    second = make(); second.train(resume_from_checkpoint=str(tmp_path/'checkpoint-4'))
    assert equal(whole.model, second.model) and not equal(whole.model, peft.get_peft_model(model(), lora))
    assert (tmp_path/'checkpoint-4'/'pose_nb.json').exists()
    whole.model.eval().merge_and_unload().save_pretrained(tmp_path/'merged')
    stock = AutoModelForCausalLM.from_pretrained(tmp_path/'merged')
    assert torch.equal(stock.model.rotary_emb.inv_freq, model().model.rotary_emb.inv_freq)


@pytest.mark.parametrize('kind', ['Trainer', 'SFTTrainer'])
def test_the_guard_judges_bf16_by_bf16_and_takes_the_wrapper_back(tmp_path, kind):
    kind = Trainer if kind == 'Trainer' else sft()
    guard = PoSECallback(SCALING)
    t = trainer(tmp_path, kind, callbacks=[guard], bf16=True, max_steps=1)
    t.train()
    assert 2e-3 < guard.report.shifted < .15      # more than the guard allows float32, which is what the wrapped model returns
    with torch.no_grad(): assert t.model(torch.arange(9)[None]).logits.dtype == torch.float32


WORKER = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_trainer import losses, trainer, weights
t = trainer(sys.argv[2], per_device_train_batch_size=2, max_steps=5, ddp_backend='gloo', use_cpu=True)
t.train()
if t.is_world_process_zero(): torch.save(dict(world=t.args.world_size, losses=losses(t), weights=weights(t.accelerator.unwrap_model(t.model))), sys.argv[2] + '/seen.pt')
from pose_nb.engines import leave
leave(0)
"""

def test_two_processes_train_as_one(tmp_path):
    (tmp_path/'worker.py').write_text(WORKER)
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(tmp_path/'worker.py'), str(Path(__file__).parent), str(tmp_path)]
    job = subprocess.Popen(words, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = job.communicate(timeout=150)
    finally: job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, out[-3000:]
    seen, alone = torch.load(tmp_path/'seen.pt'), trainer(tmp_path, max_steps=5)
    alone.train()
    assert seen['world'] == 2 and max(abs(a - b) for a, b in zip(seen['losses'], losses(alone), strict=True)) < 1e-4
    for n, p in weights(alone.model).items(): assert torch.allclose(p, seen['weights'][n], atol=2e-5), n


@pytest.mark.parametrize('kind', ['Trainer', 'SFTTrainer'])
def test_label_smoothing_and_evaluation_work_on_windows(tmp_path, kind):
    t = trainer(tmp_path, Trainer if kind == 'Trainer' else sft(), label_smoothing_factor=.1, max_steps=1)
    t.train()
    a, b = (t.evaluate(rows(4))['eval_loss'] for _ in range(2))
    assert a == b > 0 and np.isfinite(losses(t)).all()


# ── what can go wrong ──
def without_mask(rows, c=PoSECollator(SAMPLER, bos=BOS)): c.set_epoch(0); return {k: v for k, v in c(rows).items() if k != 'attention_mask'}
def padded(rows, c=PoSECollator(SAMPLER, bos=BOS)): c.set_epoch(0); b = c(rows); b['attention_mask'][0, -5:] = 0; return b
def repeated(rows, c=PoSECollator(SAMPLER, bos=BOS)): c.set_epoch(0); b = c(rows); b['position_ids'][0, -5:] = 0; return b
def half(m): return m.bfloat16()

@pytest.mark.parametrize('message,kw', [
    ('attention is cut at the position jump', dict(collator=without_mask)),
    ('the batch is padded', dict(collator=padded)),
    ('must increase strictly', dict(collator=repeated)),
    ('no position_ids', dict(collator=lambda rows: dict(input_ids=torch.ones(len(rows), 8, dtype=torch.long), labels=torch.ones(len(rows), 8, dtype=torch.long)))),
    ('remove_unused_columns=True', dict(remove_unused_columns=True)),
    ("train_sampling_strategy='group_by_length'", dict(train_sampling_strategy='group_by_length')),
    ('positions are fractions', dict(collator=PoSECollator(E2LLM(64, 256), bos=BOS))),
    ('has position .* the model claims 256', dict(collator=PoSECollator(PoSE(64, 250_000), bos=BOS))),
    ('reads its 4 examples 3 times', dict(data='view')),
    ('call set_scaling', dict(model_='plain')),
    ('call set_scaling', dict(callbacks=[PoSECallback(Linear(4.))])),
    ('do not cast a whole model', dict(model_='half')),
], ids=lambda x: x[:30] if isinstance(x, str) else '')
def test_a_run_that_would_lose_positions_is_refused(tmp_path, message, kw):
    if kw.get('model_') == 'plain': kw = kw | dict(model_=make_model())
    if kw.get('model_') == 'half': kw = kw | dict(model_=half(model()))
    if kw.get('data') == 'view': kw = kw | dict(data=RunView(windows(), 4), collator=default_data_collator)
    t = trainer(tmp_path, **kw)
    before = weights(t.model)
    with pytest.raises(PoseError, match=message): t.train()
    assert all(torch.equal(before[n], p) for n, p in t.model.named_parameters())


@pytest.mark.parametrize('message,kw', [('packing=True', dict(packing=True, packing_strategy='wrapped')), ('cuts every row to max_length', dict(dataset_kwargs=None))], ids=['packing', 'prepare'])
def test_sft_settings_that_rearrange_rows_are_refused(tmp_path, message, kw):
    with pytest.raises(PoseError, match=message): trainer(tmp_path, sft(), **kw).train()

def test_trl_itself_refuses_a_collator_with_padding_free(tmp_path):
    with pytest.raises(ValueError, match='custom data collator'): trainer(tmp_path, sft(), padding_free=True)


def test_a_collator_without_epoch_or_number_says_so(tmp_path):
    with pytest.raises(PoseError, match='no epoch was set'): trainer(tmp_path, callbacks=[]).train()
    c = PoSECollator(SAMPLER, bos=BOS); c.set_epoch(0)
    with pytest.raises(PoseError, match="no 'row_number'"): trainer(tmp_path, collator=c, callbacks=[], remove_unused_columns=True).train()


@pytest.mark.parametrize('message,bad', [
    ('needs 64', lambda: pose_rows([dict(input_ids=[1]*63)], SAMPLER)),
    ("no column 'input_ids'", lambda: pose_rows([dict(text='a')], SAMPLER)),
    ("no column 'input_ids'", lambda: pose_rows([], SAMPLER)),
    ("'completion_mask' and no 'labels'", lambda: pose_rows([dict(input_ids=[1]*99, completion_mask=[1]*99)], SAMPLER)),
    ('streamed', lambda: pose_rows(rows().to_iterable_dataset(), SAMPLER)),
    ('row 5 has 63 tokens', lambda: PoSECollator(SAMPLER).example(dict(input_ids=[1]*63, row_number=5), 0)),
    ('99 tokens and 98 labels', lambda: PoSECollator(SAMPLER).example(dict(input_ids=[1]*99, labels=[1]*98, row_number=5), 0)),
    ('none of 1000 windows of row 5', lambda: PoSECollator(SAMPLER).example(dict(input_ids=[1]*99, labels=[-100]*99, row_number=5), 0)),
    ('use RunView', lambda: PoSECollator(EvenPoSE(64, 256))),
    ('trains on nothing', lambda: RunView(None, 0)),
])
def test_bad_rows_are_refused_with_the_reason(message, bad):
    with pytest.raises(PoseError, match=message): bad()


def test_looking_at_the_first_batch_leaves_the_random_state_alone(tmp_path):
    t = trainer(tmp_path)
    t.data_collator.set_epoch(0)
    loader = t.get_train_dataloader()
    state = torch.get_rng_state()
    a, b = first_batch(loader), first_batch(loader)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(a['input_ids'], b['input_ids'])
    assert torch.equal(next(iter(loader))['position_ids'], a['position_ids'])
    check_batch(a, 256)
