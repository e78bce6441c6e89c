"The plan keeps what it is given, names a command that exists, refuses what `extend` refuses, and its estimates move the right way."
import inspect, json, shlex, warnings

import pytest

from pose_nb.cli import make_parser
from pose_nb.common import PoseError
from pose_nb.model import default_base, load_config, load_model
from pose_nb.plan import Hardware, Shape, duration, largest_batch, memory_estimate, model_shape, plan, split_step, window_flops
from pose_nb.workflow import extend, plan_extension

LLAMA = Shape(6_738_415_616, 6_607_343_616, 32, 4096, 11008, 32000)
BASE = default_base()

def parsed(command):
    words = shlex.split(command)
    assert words[:2] == ['pose_nb', 'extend']
    return vars(make_parser(extend, 'pose_nb extend').parse_args(words[2:]))

def test_given_values_are_kept():
    given = dict(max_steps=7, per_device_train_batch_size=3, gradient_accumulation_steps=5, gradient_checkpointing=True, bf16=False)
    p = plan(BASE, 1024, window=128, scaling='ntk', chunks=3, **given)
    assert all(p['recommended'][k] == v for k, v in (given | dict(scaling='ntk', chunks=3)).items())
    assert all(p['reasons'][k] == 'given' for k in (*given, 'scaling', 'chunks')) and p['coverage']['windows'] == 7 * 3 * 5
    args = parsed(p['command'])
    assert all(args[k] == v for k, v in (given | dict(target=1024, window=128, scaling='ntk', chunks=3, sampler='pose')).items())

def test_what_is_not_given_has_a_reason_and_the_result_is_json():
    p = plan(BASE, 2048)
    assert json.loads(json.dumps(p)) == p and p['calibration'] is None
    assert all(len(r) > 15 and r != 'given' for r in p['reasons'].values()) and p['reasons'].keys() == p['recommended'].keys()
    assert all(word in p['text'] for word in ('scale 8', 'worst distance', 'last tenth', 'estimated', 'assumed', p['command']))

@pytest.mark.parametrize('kw', [{}, dict(data='my texts.jsonl', output_dir="it's here", seed=3), dict(sampler='cream', sampler_kwargs=dict(sigma=2.5)), dict(sampler='full'),
                                dict(sampler='turns', sampler_kwargs=dict(split_ids=['<|im_start|>', "it's"])), dict(original=256, trust_remote_code=True), dict(scaling='none', gradient_checkpointing=True, bf16=True)])
def test_the_command_is_accepted_word_for_word(kw):
    p = plan(BASE, 2048, **kw)
    args = parsed(p['command'])
    assert args['model'] == str(BASE) and args['target'] == 2048 and args['data'] == [kw.get('data', 'stdlib')] and args['output_dir'] == kw.get('output_dir', 'out')
    assert all(args[k] == v for k, v in (p['recommended'] | kw).items() if k != 'data')

def test_the_planned_command_runs(cli, checkpoint, corpus, tmp_path):
    p = plan(checkpoint(), 256, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, data=str(corpus.jsonl), output_dir=str(tmp_path/'out'))
    ran = cli(*shlex.split(p['command'])[1:], '--no-progress')
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path/'out'/'pose_nb.json').read_text())
    assert record['result']['steps'] == 2 and record['result']['tokens'] == 2 * 4 * p['window']

def test_plan_has_a_command_line():
    args = vars(make_parser(plan, 'pose_nb plan').parse_args(['m', '--target', '32k', '--chunks', '3', '--max-steps', '10', '--no-bf16', '--calibrate']))
    assert args['target'] == 32768 and args['chunks'] == 3 and args['bf16'] is False and args['gradient_checkpointing'] is None and args['calibrate']
    assert args.keys() == inspect.signature(plan).parameters.keys()

def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing():
    total = lambda *a: memory_estimate(LLAMA, 4096, *a)['total']
    assert total(1) < total(2) < total(4) and total(4, True) < total(4) and total(4, False, True) < total(4) and total(1, True) > 16 * LLAMA.parameters / 2**30

def test_work_grows_with_checkpointing_and_window():
    assert window_flops(LLAMA, 4096, False) < window_flops(LLAMA, 4096, True) < 8 / 6 * window_flops(LLAMA, 4096, False) and window_flops(LLAMA, 8192, False) > 2 * window_flops(LLAMA, 4096, False)

@pytest.mark.parametrize('memory', [16, 120, 140, 200, 400, 2000])
def test_a_step_fits_where_it_can(memory):
    card = Hardware('cuda', '', memory, True)
    b, a, c = split_step(LLAMA, 4096, card, True)
    need = lambda b, c: memory_estimate(LLAMA, 4096, b, c, True)['total']
    assert b * a == 64 and (need(b, c) <= card.usable or (b, c) == (1, True))
    if b < 64 and need(b, c) <= card.usable: assert need(2 * b, c) > card.usable
    if c: assert largest_batch(LLAMA, 4096, card, False, True) == 0

@pytest.mark.parametrize('kw,expect', [(dict(micro=3), (3, 22, False)), (dict(accumulation=16), (4, 16, False)), (dict(micro=2, accumulation=1, checkpointing=True), (2, 1, True)), (dict(accumulation=100), (1, 100, False))])
def test_split_keeps_what_is_given(kw, expect): assert split_step(Shape(10**6, 10**6, 2, 64, 128, 1000), 256, Hardware('cuda', '', 80, True), **kw) == expect

@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2', 'gptj'])
def test_shape_counts_the_real_model(checkpoint, kind):
    net, s = load_model(checkpoint(kind)), model_shape(load_config(checkpoint(kind)))
    assert s.parameters == net.num_parameters() and (s.layers, s.vocab) == (2, 300) and 0 < s.active <= s.parameters

def test_only_chosen_experts_are_active():
    from transformers import MixtralConfig
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=100, num_local_experts=8, num_experts_per_tok=2)
    s, experts = model_shape(config), 2 * 8 * 3 * 32 * 64
    assert s.active == s.parameters - 100 * 32 - experts * 6 // 8 and s.inner == 2 * 64

@pytest.mark.parametrize('kw', [{}, dict(sampler='longrecipe'), dict(sampler='turns', sampler_kwargs=dict(split_ids=['<|im_start|>'])), dict(sampler='e2llm'), dict(sampler='pose_even', scaling='dynamic')])
def test_calibrate_measures(kw):
    k = plan(BASE, 1024, per_device_train_batch_size=1, max_steps=10, gradient_accumulation_steps=4, calibrate=True, **kw)['calibration']
    assert k['micro_batch'] > 0 and k['peak_gib'] >= k['before_gib'] >= 0 and k['peak_gib'] > 0
    assert k['step'] == 4 * k['micro_batch'] and k['total'] == 10 * k['step']

def test_no_weights_are_read(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    p = plan(tmp_path, 32768)
    assert p['shape'] == LLAMA.__dict__ and [f.name for f in tmp_path.iterdir()] == ['config.json']

def test_what_does_not_fit_is_said_and_not_measured(tmp_path, monkeypatch):
    from transformers import LlamaConfig
    import pose_nb.plan
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    monkeypatch.setattr(pose_nb.plan, 'find_hardware', lambda: Hardware('cpu', 'a small machine', 8., False))
    p = plan(tmp_path, 32768)
    assert not p['memory']['fits'] and 'this does not fit' in p['text']
    with pytest.raises(PoseError, match='nothing can be measured here'): plan(tmp_path, 32768, calibrate=True)

def test_an_extended_checkpoint_is_noted_once(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig(**{**dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=100), 'max_position_embeddings': 1024},
                rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=4., original_max_position_embeddings=256)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        p = plan(tmp_path, 2048)
    assert p['original'] == 256 and 'extended before, by linear' in p['text'] and 'which extend replaces' in p['reasons']['scaling']

@pytest.mark.parametrize('sampler,kw', [('longrecipe', {}), ('turns', dict(sampler_kwargs=dict(split_ids=[5])))])
def test_coverage_of_samplers_that_read_is_not_invented(sampler, kw):
    p = plan(BASE, 2048, sampler=sampler, **kw)
    assert p['coverage'] is None and 'depend on the text' in p['text'] and 'depends on the text' in p['reasons']['max_steps']

def test_full_trains_on_the_target(): assert plan(BASE, 1024, sampler='full')['window'] == 1024

@pytest.mark.parametrize('kw', [dict(target=256), dict(target=100), dict(sampler='best'), dict(chunks=0), dict(window=1), dict(scaling='cubic'), dict(sampler='cream', chunks=3), dict(model='/nowhere'),
                                dict(sampler_kwargs=dict(sigma=1)), dict(target=10**9), dict(original=1.5)])
def test_refused_as_extend_refuses(kw):
    kw = dict(model=BASE, target=2048) | kw
    with pytest.raises(PoseError) as theirs: plan_extension(**kw)
    with pytest.raises(PoseError) as ours: plan(**kw)
    assert str(ours.value) == str(theirs.value)

@pytest.mark.parametrize('field', ['max_steps', 'per_device_train_batch_size', 'gradient_accumulation_steps'])
@pytest.mark.parametrize('value', [0, -3])
def test_settings_below_one(field, value):
    with pytest.raises(PoseError, match=f'^{field} is {value}; it must be at least 1.$'): plan(BASE, 2048, **{field: value})

def test_durations(): assert [duration(s) for s in (0, 3.21, 300, 7200 * 2.5, 86400 * 12, 86400 * 3650)] == ['0 s', '3.2 s', '5 min', '5 h', '12 days', '9.99 years']
