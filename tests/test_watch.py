"The exam says what slower ways say, changes nothing about the run, and the gate and the choice of weights do as told."
import itertools, json, math, warnings
from dataclasses import replace

import numpy as np, pytest, torch
from conftest import make_model, make_texts, make_tokenizer
from hypothesis import given, settings as hypothesis_settings, strategies as st
from safetensors.torch import load_file

from pose_nb.common import PoseError
from pose_nb.data import WindowDataset, tokenize
from pose_nb.engines import make_accelerator
from pose_nb.interpolation import YaRN
from pose_nb.model import set_scaling
from pose_nb.perplexity import perplexity
from pose_nb.positions import Contiguous, PoSE, example_rng
from pose_nb.samplers import CREAM, RandPos
from pose_nb.train import LossModel, TrainSettings, train
from pose_nb.watch import Exam, Monitor, Seen, keys_found, load_best, mean_loss, plot_watch, shape_of, sit, window_flops

SETTINGS = TrainSettings(max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3, warmup_steps=1, eval_steps=2)
TOKENIZER = make_tokenizer()


def store(**kw): return tokenize(make_texts(**kw), TOKENIZER, progress=False)
def exam(**kw): return Exam(store(n=8, words=400, seed=5), TOKENIZER, 64, 256, **dict(windows=3, prompts=4, bos=0) | kw)
def dataset(): return WindowDataset(store(), PoSE(64, 256), seed=0, bos=0)
def model(**kw): return set_scaling(make_model(**kw), YaRN(4.), 256)
def watched(m=None, settings=SETTINGS, **kw):
    m = m or model()
    return m, train(m, dataset(), settings, progress=False, monitor=Monitor(m, 256, settings, exam(), **kw))


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.sampled_from([PoSE(24, 96), PoSE(24, 96, chunks=5), RandPos(24, 96), RandPos(80, 96), CREAM(48, 96), Contiguous(24, 96)]), st.integers(0, 10**6), st.integers(1, 4))
def test_every_distance_between_two_positions_is_ticked_off_and_no_other(sampler, seed, n):
    seen, want = Seen(96), np.arange(96) == 0
    for i in range(n):
        p = sampler(max(sampler.min_doc_len, 200), example_rng(seed, 0, i)).position_ids
        seen.add(torch.from_numpy(p)[None])
        want[[b - a for a, b in itertools.combinations(p, 2)]] = True
    assert (seen.met == want).all()
    r, missing = seen.report(), np.flatnonzero(~want)
    assert math.isclose(r['unseen'], len(missing) / 95, abs_tol=1e-9)
    far = [min(abs(m - s) for s in np.flatnonzero(want)) for m in missing]
    assert r['worst_gap'] == max(far, default=0) and (not far or far[list(missing).index(r['worst_unseen'])] == max(far))


def test_mean_loss_is_the_models_own_loss():
    m, e, acc = model(), exam(), make_accelerator(SETTINGS)
    for examples in (e.near, e.far):
        with torch.no_grad(): own = [(m(input_ids=x['input_ids'][None], labels=x['labels'][None], use_cache=False).loss.item(), (x['labels'][1:] != -100).sum().item()) for x in examples]
        with torch.no_grad(): got = mean_loss(acc, LossModel(m, 16), examples)
        assert abs(got - sum(l * n for l, n in own) / sum(n for _, n in own)) < 1e-5
    assert {len(x['input_ids']) for x in e.near} == {64} and {len(x['input_ids']) for x in e.far} == {256}


def test_a_key_counts_as_found_when_greedy_decoding_would_write_it():
    m, e, acc = model(), exam(prompts=6), make_accelerator(SETTINGS)
    class Knows(torch.nn.Module):
        "A model that reads the answer of some prompts out of a list."
        def __init__(self, known): super().__init__(); self.known, self.w = known, torch.nn.Parameter(torch.zeros(1))
        def forward(self, input_ids, logits_to_keep, **kw):
            from types import SimpleNamespace
            logits = torch.zeros(1, logits_to_keep, len(TOKENIZER))
            for p in self.known:
                if input_ids[0, :len(p.ids)].tolist() == p.ids: logits[0, range(len(p.answer)), p.answer] = 1
            return SimpleNamespace(logits=logits)
    prompts = [p for _, p in e.prompts]
    found = keys_found(acc, Knows(prompts[1:3]), e.prompts)
    assert list(found.values()) == [0., 1., 1., 0., 0., 0.] and list(found) == [0., .2, .4, .6, .8, 1.]
    greedy = [m.generate(torch.tensor([p.ids]), max_new_tokens=len(p.answer), do_sample=False)[0, len(p.ids):].tolist() == p.answer for p in prompts]
    with torch.no_grad(): assert list(keys_found(acc, LossModel(m), e.prompts).values()) == [float(g) for g in greedy]


def test_an_exam_changes_nothing_about_the_run():
    plain = train(a := model(attention_dropout=.1), dataset(), replace(SETTINGS, eval_steps=0), progress=False)
    m, r = watched(model(attention_dropout=.1))
    assert [x['loss'] for x in r.history] == [x['loss'] for x in plain.history]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), m.parameters())) and not m.training
    assert [x['step'] for x in r.history if 'eval_long_loss' in x] == [2, 4, 6] and all('unseen' in x for x in r.history)
    assert sit(exam(), make_accelerator(SETTINGS), LossModel(m))['eval_long_loss'] == pytest.approx(r.history[-1]['eval_long_loss'], abs=1e-6)


def test_seen_distances_survive_a_stop(tmp_path):
    whole = watched()[1].history
    m = model()
    s = replace(SETTINGS, save_steps=3)
    train(m, dataset(), s, tmp_path, progress=False, monitor=Monitor(m, 256, s, exam(), output_dir=tmp_path))
    m = model()
    again = train(m, dataset(), s, tmp_path, resume=tmp_path/'checkpoint-3', progress=False, monitor=Monitor(m, 256, s, exam(), output_dir=tmp_path))
    keys = ('loss', 'unseen', 'worst_unseen', 'eval_long_loss', 'eval_short_loss', 'eval_passkey')
    assert [{k: x.get(k) for k in keys} for x in again.history] == [{k: x.get(k) for k in keys} for x in whole]


@pytest.mark.parametrize('stop', [False, True])
def test_the_gate_looks_from_the_middle_on_and_warns_or_stops(stop):
    s = replace(SETTINGS, max_short_loss=-9., stop_on_short_loss=stop)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        _, r = watched(settings=s, base_loss=5.)
    texts = [str(w.message) for w in said if 'short texts cost' in str(w.message)]
    assert r.step == (4 if stop else 6) and len(texts) == (1 if stop else 2)
    assert ('the run stops here' in texts[0]) == stop and ('--mix-original' in texts[0]) != stop
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert watched(settings=replace(s, max_short_loss=99.), base_loss=5.)[1].step == 6


@pytest.mark.parametrize('metric', ['long_loss', 'short_loss'])
def test_the_best_weights_are_those_of_the_best_exam(metric, tmp_path):
    s = replace(SETTINGS, max_steps=3, eval_steps=1, learning_rate=.5, lr_scheduler_type='constant', load_best_model_at_end=True, metric_for_best_model=metric)      # a rate that makes it worse again
    m = model()
    r = train(m, dataset(), s, tmp_path, progress=False, monitor=Monitor(m, 256, s, exam(), output_dir=tmp_path))
    scores = [x[f'eval_{metric}'] for x in r.history]
    best = json.loads((tmp_path/'best.json').read_text())
    assert best['step'] == 1 + int(np.argmin(scores)) and best['score'] == [min(scores)] and min(scores) < scores[-1]
    load_best(m, tmp_path)
    assert sit(exam(), make_accelerator(s), LossModel(m))[f'eval_{metric}'] == pytest.approx(min(scores), abs=1e-5)


def test_flops_of_llama():
    "Six operations per weight that a token meets, and the causal half of attention."
    m = make_model()
    shape = shape_of(m)
    assert shape.active == sum(p.numel() for p in m.parameters()) - m.model.embed_tokens.weight.numel()
    assert window_flops(shape, 64) == 64 * (6 * shape.active + 6 * 2 * 32 * 64) and window_flops(shape, 64, checkpointing=True) > window_flops(shape, 64)


def test_a_figure_for_runs_with_and_without_keys():
    rows = [dict(step=i, eval_long_loss=2., eval_long_ppl=math.exp(2.), eval_short_loss=1.) for i in (1, 2)]
    a, b = plot_watch(rows, .9)
    assert len(a.lines) == 3 and not b.lines
    assert len(plot_watch([r | dict(eval_passkey=.5) for r in rows])[1].lines) == 1


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip('tensorboard')
    s = replace(SETTINGS, report_to='tensorboard', eval_steps=0, max_steps=2)
    train(model(), dataset(), s, tmp_path, progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next(tmp_path.rglob('events.out*')).parent)); events.Reload()
    assert {'loss', 'grad_norm', 'learning_rate', 'tokens_per_second'} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('loss')] == [1, 2]
