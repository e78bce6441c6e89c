"Ordinary windows of whole documents: nothing is lost, nothing leaks, and short rows rotate as the finished model does."
import copy, json
from dataclasses import replace

import numpy as np, pytest, torch
from conftest import TARGET, WINDOW, make_model, make_texts, make_tokenizer
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch.utils.data import DataLoader

from pose_nb.common import PoseError, read_json
from pose_nb.convert import converted
from pose_nb.data import Mixture, TokenStore, WindowDataset, collate, tokenize
from pose_nb.interpolation import DynamicNTK, LongRoPE, YaRN
from pose_nb.model import cast_weights, feed_positions, load_model, rotary_modules, seam_guard, set_scaling
from pose_nb.positions import PoSE
from pose_nb.short import PackedDataset, ShortRotation, attention_of, check_short, feed_short, pack_documents, packing_guard, short_rotation, switches
from pose_nb.sources import Sources
from pose_nb.train import LossModel, TrainSettings, head_guard, train
from pose_nb.workflow import extend

LISTS = LongRoPE(4., long_factor=tuple(np.linspace(1, 4, 8)), short_factor=(1.,) * 8, attention_factor=1.1)
SETTINGS = TrainSettings(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1)
PLAN = dict(window=WINDOW, original=WINDOW, target=TARGET, stream=False, mix_original=.3, mix_documents=True, mix_original_rope=True)


def store_of(lengths):
    "Every token is its own id, so that what was read can be told."
    return TokenStore(np.arange(sum(lengths), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def store(words=9, n=40): return tokenize(make_texts(n, words), make_tokenizer(), progress=False)
def model(scheme=YaRN(4.), **kw): return set_scaling(make_model(**kw), scheme, TARGET, WINDOW)
def dataset(short=False):
    packed = PackedDataset(store(), WINDOW, 0, 0)
    return Mixture([(WindowDataset(store(240), PoSE(WINDOW, TARGET), 0, 0), .5), (ShortRotation(packed) if short else packed, .5)], 0)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda n: max(n) > 1), st.integers(2, 50), st.booleans(), st.integers(0, 10**6))
def test_windows_are_full_and_every_document_is_read_once_in_a_pass(lengths, window, bos, seed):
    s = store_of(lengths)
    d = PackedDataset(s, window, seed, 9999 if bos else None)
    read = []
    for i in range(len(d)):
        e, parts = d[i], d.documents(i)
        ids, docs = e['input_ids'].numpy(), e['document_ids'].numpy()
        assert {k: tuple(v.shape) for k, v in e.items()} == dict.fromkeys(('input_ids', 'labels', 'position_ids', 'attention_mask', 'loss_weights', 'document_ids'), (window,))
        assert (e['position_ids'] == torch.arange(window)).all() and docs[0] == 0 and set(np.diff(docs)) <= {0, 1} and docs[-1] == len(parts) - 1
        for k, (doc, start, n) in enumerate(parts):
            own, labels = ids[docs == k], e['labels'].numpy()[docs == k]
            assert (own[:1] == 9999).all() if bos else True
            assert (own[bos:] == s[doc][start:start + n]).all() and len(own) == n + bos
            assert start == 0 or lengths[doc] + bos > window
            assert n == lengths[doc] or k == len(parts) - 1                        # only the last one is cut
            assert (labels[0] == -100 if k else labels[0] == own[0]) and (labels[1:] == own[1:]).all()
        read += [doc for doc, *_ in parts]
    once = [i for i, n in enumerate(lengths) if n + bos >= 2]
    assert set(read) == set(once)
    assert len(read) - len(once) < len(d.documents(len(d) - 1))                    # what tops up the last window
    assert d.place(len(d)) == (1, 0) and d.place(len(d) - 1) == (0, len(d) - 1)


@hypothesis_settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.permutations(range(40)))
def test_an_example_depends_on_seed_and_index_alone(seed, order):
    a, b = (PackedDataset(store_of([3, 9, 1, 30, 7, 2]), 16, seed) for _ in range(2))
    later = {i: b[i] for i in order}
    for i in range(40): assert all(torch.equal(a[i][k], later[i][k]) for k in later[i])


def test_another_pass_has_another_order_and_other_stretches():
    d = PackedDataset(store_of([5] * 20 + [500]), 16, 0)
    a, b = ([d.documents(i) for i in range(at, at + 5)] for at in (0, len(d)))
    assert a != b
    starts = {s for i in range(400) for doc, s, n in d.documents(i) if doc == 20}
    assert len(starts) > 10 and max(starts) > 400


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2', 'gptj'])
def test_no_token_sees_another_document_and_a_jump_is_still_seen_across(kind, attention):
    m = set_scaling(converted(make_model(kind)), YaRN(4.), TARGET)
    m.set_attn_implementation(attention)
    batch = collate([PackedDataset(store(), WINDOW, 0, 0)[0], WindowDataset(store(240), PoSE(WINDOW, TARGET), 0, 0)[0]])
    docs, seam = batch['document_ids'], int((batch['position_ids'][1].diff() != 1).nonzero()[0]) + 1
    assert docs[0].max() >= 2 and not docs[1].any()
    def hidden(ids):
        with torch.no_grad(): return m(input_ids=ids, position_ids=batch['position_ids'], attention_mask=attention_of(m, batch), use_cache=False).logits
    a = hidden(batch['input_ids'])
    for k in range(int(docs[0].max()) + 1):
        other = batch['input_ids'].clone(); other[0, docs[0] == k] = 5
        b = hidden(other)
        assert torch.equal(a[0, docs[0] != k], b[0, docs[0] != k]) and not torch.allclose(a[0, docs[0] == k], b[0, docs[0] == k])
        assert torch.equal(a[1], b[1])
    other = batch['input_ids'].clone(); other[1, :seam] = 5
    assert ((hidden(other) - a)[1, seam:].abs().amax(-1) > 1e-4).all()


def test_a_packed_document_has_the_loss_it_has_alone():
    m, e = model(), PackedDataset(store(), WINDOW, 0, 0)[0]
    with torch.no_grad():
        together, alone = LossModel(m)(collate([e])), 0.
        for k in range(int(e['document_ids'].max()) + 1):
            here = e['document_ids'] == k
            part = {n: v[here][None] for n, v in e.items() if n != 'document_ids'} | dict(position_ids=torch.arange(int(here.sum()))[None])
            alone += LossModel(m)(part)
    assert abs(together - alone) < 1e-4 * abs(alone)


def test_positions_may_as_well_restart_in_every_document():
    m, batch = model(), collate([PackedDataset(store(), WINDOW, 0, 0)[0]])
    docs = batch['document_ids'][0]
    restarted = torch.cat([torch.arange(int((docs == k).sum())) for k in range(int(docs.max()) + 1)])[None]
    with torch.no_grad(): a, b = (m(input_ids=batch['input_ids'], position_ids=p, attention_mask=attention_of(m, batch), use_cache=False).logits for p in (batch['position_ids'], restarted))
    assert (restarted == 0).sum() > 2 and torch.allclose(a, b, atol=1e-4 * a.abs().max())


def test_a_batch_without_documents_is_as_before():
    d = WindowDataset(store(240), PoSE(WINDOW, TARGET), 0, 0)
    batch = collate([d[0], d[1]])
    assert set(batch) == {'input_ids', 'labels', 'position_ids', 'attention_mask', 'loss_weights'} and attention_of(model(), batch) is batch['attention_mask']
    with pytest.raises(KeyError): collate([d[0], d[1] | dict(other=torch.zeros(1))])


def test_a_mixed_batch_costs_what_its_rows_cost_alone():
    m, d = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW), dataset(short=True)
    rows = [d[i] for i in range(8)]
    assert 0 < sum('document_ids' in r for r in rows) < 8
    batch = collate(rows)
    assert batch['short_rope'].tolist() == ['short_rope' in r for r in rows] and batch['document_ids'].shape == (8, WINDOW)
    with torch.no_grad(): together, alone = LossModel(m)(batch), sum(LossModel(m)(collate([r])) for r in rows)
    assert abs(together - alone) < 1e-4 * abs(alone)


def test_the_guards_take_a_batch_of_any_kind():
    m, d = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW), dataset(short=True)
    for rows in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        batch = collate([d[i] for i in rows])
        seam_guard(m, batch); head_guard(LossModel(m), batch)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path, workers):
    def run(out, **kw):
        torch.manual_seed(0)
        m = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW)
        resume = kw.pop('resume', None)
        r = train(m, dataset(short=True), replace(SETTINGS, max_steps=6, save_steps=3, dataloader_num_workers=workers, **kw), out, resume, progress=False)
        return [x['loss'] for x in r.history], {k: v.clone() for k, v in m.state_dict().items()}
    whole, weights = run(tmp_path/'a')
    again, same = run(tmp_path/'a', resume=tmp_path/'a'/'checkpoint-3')
    assert whole == again and all(torch.equal(weights[k], same[k]) for k in weights)


def test_workers_draw_the_same_examples():
    d = PackedDataset(store(), WINDOW, 0, 0)
    for n, got in enumerate(DataLoader(d, batch_sampler=[[i, i + 30] for i in range(12)], collate_fn=collate, num_workers=2)):
        assert torch.equal(got['input_ids'], collate([d[n], d[n + 30]])['input_ids'])


@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2'])
@pytest.mark.parametrize('scheme', [LISTS, DynamicNTK(4.)], ids=['longrope', 'dynamic'])
def test_flagged_rows_rotate_as_the_saved_model_does(kind, scheme, tmp_path):
    from transformers import AutoModelForCausalLM
    m = short_rotation(model(scheme.at(TARGET, WINDOW), kind=kind), scheme, WINDOW)
    model(scheme, kind=kind).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 300, (3, WINDOW))
    with torch.no_grad():
        for n in (8, WINDOW):
            want = stock(ids[:, :n]).logits
            feed_short(m, torch.tensor([True, False, True])); got = m(ids[:, :n], attention_mask=torch.ones(3, n)).logits
            assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and not torch.allclose(got[1], want[1], atol=1e-3)
        feed_short(m, None); long = m(ids).logits
        assert torch.equal(long[1], got[1]) and torch.allclose(long, model(scheme.at(TARGET, WINDOW), kind=kind)(ids).logits)


def test_layers_that_differ_in_kind_keep_their_own_rotation():
    from pose_nb.architectures import tiny_model
    base = tiny_model('gemma3_text')
    original = base.config.max_position_embeddings
    m = short_rotation(set_scaling(copy.deepcopy(base), DynamicNTK(4.).at(4 * original, original), 4 * original, original), DynamicNTK(4.), original)
    ids = torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        feed_short(m, torch.tensor([True, False])); got, want = m(ids, use_cache=False).logits, base(ids, use_cache=False).logits
    assert torch.allclose(got[0], want[0], atol=1e-5) and not torch.allclose(got[1], want[1], atol=1e-5)


def test_short_rows_and_fractional_positions_go_together():
    m = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW)
    ids, at = torch.randint(0, 300, (2, 16)), torch.arange(16.).expand(2, -1)
    with torch.no_grad():
        feed_short(m, torch.tensor([True, False]))
        want = m(ids, attention_mask=torch.ones(2, 16)).logits
        got = m(ids, attention_mask=torch.ones(2, 16), **feed_positions(m, at)).logits
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputed_activations_rotate_the_same(reentrant):
    batch = collate([dataset(short=True)[i] for i in range(6)])
    def gradients(checkpointing):
        m = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW).train()
        if checkpointing: m.gradient_checkpointing_enable(dict(use_reentrant=reentrant)); m.enable_input_require_grads()
        LossModel(m)(batch).backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    assert torch.allclose(gradients(False), gradients(True), atol=1e-6)


def test_the_twin_is_neither_saved_nor_rescaled_and_goes_with_the_next_scaling():
    m = model(LISTS.at(TARGET, WINDOW)); names, modules = set(m.state_dict()), len(rotary_modules(m))
    short_rotation(m, LISTS, WINDOW); short_rotation(m, LISTS, WINDOW)
    assert set(m.state_dict()) == names and len(rotary_modules(m)) == modules and len(m.model.rotary_emb._forward_hooks) == 1
    feed_short(cast_weights(copy.deepcopy(m), torch.bfloat16), torch.tensor([True]))
    set_scaling(m, LISTS, TARGET)
    assert not any(x._forward_hooks for x in m.modules())
    with pytest.raises(PoseError, match='not prepared'): feed_short(m, torch.tensor([True]))


def test_flags_do_not_outlive_their_batch_or_the_run():
    m, batch = short_rotation(model(LISTS.at(TARGET, WINDOW)), LISTS, WINDOW), collate([dataset(short=True)[i] for i in range(6)])
    loss, ids = LossModel(m), torch.randint(0, 300, (1, 8))
    with torch.no_grad():
        want = m(ids).logits
        loss(batch); assert torch.equal(loss(input_ids=ids).logits, want)
        loss(batch); loss(collate([WindowDataset(store(240), PoSE(WINDOW, TARGET), 0, 0)[0]])); assert torch.equal(m(ids).logits, want)
    train(m, dataset(short=True), SETTINGS, progress=False)
    assert m.model.rotary_emb.short_flags is None


def test_which_schemes_look_at_the_length():
    assert switches(LISTS, 64, 256) and switches(DynamicNTK(4.), 64, 256)
    assert not switches(YaRN(4.), 64, 256) and not switches(LongRoPE(4., (1.,) * 8), 64, 256) and not switches(LongRoPE(4., (2.,) * 8, (2.,) * 8), 64, 256)


@pytest.mark.parametrize('changed,scheme,attention,says', [
    (dict(mix_original=0.), LISTS, None, '--mix-original'), (dict(stream=True), LISTS, None, '--stream'), ({}, LISTS, 'flash_attention_2', 'sdpa'),
    ({}, LISTS, 'flex_attention', 'sdpa'), ({}, YaRN(4.), None, 'two lists'), (dict(window=65), LISTS, None, 'at most 64')])
def test_what_cannot_work_is_refused(changed, scheme, attention, says):
    check_short(PLAN, LISTS, 'eager'); check_short(PLAN | dict(mix_documents=False, mix_original_rope=False), YaRN(4.), 'flash_attention_2')
    with pytest.raises(PoseError, match=says) as e: check_short(PLAN | changed, scheme, attention)
    assert '\n' not in str(e.value) and str(e.value).endswith('.')


def test_data_and_models_that_cannot_be_packed_are_refused():
    from pose_nb.architectures import tiny_model
    with pytest.raises(PoseError, match='two tokens'): PackedDataset(store_of([1, 0, 1]), 8)
    with pytest.raises(PoseError, match='at least 2'): PackedDataset(store_of([9]), 1)
    with pytest.raises(PoseError, match='--stream'): pack_documents(object(), 8)
    m = make_model('mistral', sliding_window=16)
    packing_guard(m, 16)
    with pytest.raises(PoseError, match='at most 16'): packing_guard(m, 17)
    for kind in ('bamba', 'qwen3_next'):
        with pytest.raises(PoseError, match='mixes up'): packing_guard(tiny_model(kind), 32)
    for kind in ('deepseek_v3', 'gemma2', 'llama'): packing_guard(tiny_model(kind), 8)


def test_several_sources_keep_their_shares():
    s = Sources({n: (WindowDataset(store(w), PoSE(WINDOW, TARGET), seed, 0), share) for n, w, seed, share in (('a', 200, 0, .3), ('b', 240, 1, .7))}, 5)
    d = pack_documents(s, WINDOW)
    assert d.names == ['a', 'b'] and np.allclose(d.shares, s.shares) and all('document_ids' in d[i] for i in range(5)) and d.report['sources']['a']['below_window'] == 0


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_extend_end_to_end(checkpoint, corpus, tmp_path, attention):
    data = tmp_path/'mixed.jsonl'
    data.write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in corpus.texts + make_texts(60, 6, seed=1)))
    kw = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1, progress=False, scaling='longrope', attn_implementation=attention,
              scaling_kwargs=dict(long_factor=list(LISTS.long_factor), short_factor=[1.] * 8, attention_factor=1.), mix_original=.5, mix_documents=True, mix_original_rope=True)
    exam = dict(eval_steps=3, eval_data=str(corpus.txt), eval_windows=2, eval_prompts=2)
    record = extend(checkpoint(), TARGET, str(data), tmp_path/'out', **kw, **exam)
    assert record['status'] == 'done' and record['plan']['mix_documents'] and record['plan']['mix_original_rope'] and record['data']['packed']['below_window'] >= 60
    assert read_json(tmp_path/'out'/'pose_nb.json')['plan'] == record['plan']
    stock = load_model(tmp_path/'out')
    assert stock.config.rope_parameters['short_factor'] == [1.] * 8
    again = extend(checkpoint(), TARGET, str(data), tmp_path/'again', **kw, **exam)['result']
    assert again['final_loss'] == record['result']['final_loss']
    from pose_nb.watch import Exam                                      # the exam's near loss is that of the saved model
    tok = make_tokenizer()
    near = Exam(tokenize([corpus.txt.read_text()], tok, progress=False), tok, WINDOW, TARGET, 2, 0, 0, 0).near
    with torch.no_grad(): saved = sum(LossModel(stock)(collate([e])) for e in near) / sum((e['labels'][1:] != -100).sum() for e in near)
    assert abs(saved - record['result']['eval_short_loss']) < 1e-3


@pytest.mark.parametrize('kw,says', [(dict(mix_documents=True), '--mix-original'), (dict(mix_original=.2, mix_original_rope=True), 'two lists'),
                                     (dict(mix_original=.2, mix_documents=True, stream=True), '--stream'), (dict(mix_original=.2, mix_documents=True, attn_implementation='flex_attention'), 'sdpa')])
def test_extend_refuses_before_it_writes(checkpoint, corpus, tmp_path, kw, says):
    with pytest.raises(PoseError, match=says): extend(checkpoint(), TARGET, str(corpus.jsonl), tmp_path/'out', max_steps=2, progress=False, **kw)
    assert not (tmp_path/'out').exists()


def test_lora_takes_both(checkpoint, corpus, tmp_path):
    pytest.importorskip('peft')
    r = extend(checkpoint(), TARGET, str(corpus.jsonl), tmp_path/'out', max_steps=2, progress=False, scaling='dynamic', lora_r=2, mix_original=.5, mix_documents=True, mix_original_rope=True)
    assert r['status'] == 'done' and load_model(tmp_path/'out').config.rope_parameters['rope_type'] == 'dynamic'
