"""The doctor sees what a config makes of a model, asks where it cannot know, and repairs without losing anything."""
import json, shutil

import numpy as np, pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config, PhiConfig, Qwen2Config

from pose_nb.common import PoseError, read_json
from pose_nb.doctor import diagnose, doctor, findings, intended, repair, transformers_5, vllm, sglang, llama_cpp
from pose_nb.export import patch_checkpoint
from pose_nb.interpolation import *
from pose_nb.model import default_base, load_model, rope_info

SMALL = dict(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
LONG = dict(rope_type='longrope', rope_theta=1e4, factor=4., short_factor=[1.] * 16, long_factor=np.linspace(1, 4, 16).tolist(), original_max_position_embeddings=64)


def base(tmp_path, name='x', **changes):
    "The embedded base with a config changed by hand; None removes a key."
    shutil.copytree(default_base(), tmp_path/name)
    raw = read_json(tmp_path/name/'config.json') | changes
    (tmp_path/name/'config.json').write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return tmp_path/name


@pytest.mark.parametrize('config', [
    PhiConfig(**SMALL, partial_rotary_factor=.4), GPTNeoXConfig(**SMALL, rotary_pct=.25), LlamaConfig(**SMALL, head_dim=48), Qwen2Config(**SMALL, num_key_value_heads=1),
    LlamaConfig(**SMALL, rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=2.)),
    LlamaConfig(**{**SMALL, 'max_position_embeddings': 256}, rope_parameters=LONG), LlamaConfig(**{**SMALL, 'max_position_embeddings': 256}, rope_parameters=LONG | dict(attention_factor=1.3)),
    Phi3Config(**{**SMALL, 'max_position_embeddings': 256}, original_max_position_embeddings=64, rope_parameters=LONG, pad_token_id=0),
    Gemma3TextConfig(**{**SMALL, 'num_hidden_layers': 6}, head_dim=32, num_key_value_heads=1),
], ids=['phi_partial', 'neox_partial', 'head_dim', 'qwen2', 'dynamic', 'longrope', 'longrope_attention', 'phi3', 'gemma3'])
def test_the_row_of_transformers_is_what_transformers_computes(config, tmp_path):
    config.save_pretrained(tmp_path)
    r = transformers_5(tmp_path, 200)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad(): model(torch.arange(8)[None], position_ids=torch.arange(192, 200)[None], attention_mask=torch.ones(1, 8).long())
    m = model.model.rotary_emb if hasattr(model, 'model') else model.gpt_neox.rotary_emb
    held = m.full_attention_inv_freq if hasattr(m, 'full_attention_inv_freq') else m.inv_freq
    assert not r.problem and torch.equal(r.inv_freq, held.double()) and r.attention == getattr(m, 'attention_scaling', getattr(m, 'full_attention_attention_scaling', None))


@pytest.mark.parametrize('scheme', [NoScaling(), Linear(8), NTK(8), NTKByParts(8), YaRN(8), YaRNRevised(8), Llama3(8), ABF(8, 8e3), LongRoPE(8, np.geomspace(1, 8, 16).tolist(), [1.] * 16), DynamicNTK(8)], ids=lambda s: s.name)
def test_what_this_package_writes_is_read_as_intended(scheme, tmp_path):
    out = patch_checkpoint(default_base(), scheme, 2048, tmp_path/'m')
    verdicts = dict(zip(('t5', 't4.57', 't4.46', 'vllm', 'sglang', 'llama.cpp'), [r['verdict'] for r in diagnose(out, intended(out))]))
    other = dict(yarn={'t4.46': 'wrong'}, ntk_by_parts={'llama.cpp': 'wrong'}, yarn_revised={'llama.cpp': 'wrong'}, longrope={'llama.cpp': 'wrong', 'vllm': 'short'},    # vLLM serves the original length of two lists
                 dynamic={'t5': 'short', 't4.57': 'short', 't4.46': 'short', 'vllm': 'wrong', 'llama.cpp': 'wrong'}).get(scheme.name, {})
    assert verdicts == dict.fromkeys(verdicts, 'same') | other


def test_an_original_length_that_nobody_names_is_asked_for(tmp_path):
    folder = base(tmp_path, max_position_embeddings=2048, rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1000.))
    with pytest.raises(PoseError, match='original length is unknown'): doctor(folder)
    with pytest.raises(PoseError, match='original length is unknown'): patch_checkpoint(folder, YaRN(8.), 2048, tmp_path/'y')
    assert doctor(folder, original=256)['intended']['original'] == 256
    before = (folder/'config.json').read_bytes()
    r = doctor(folder, scaling='yarn', original=256, fix=True)
    assert (folder/'config.json.bak').read_bytes() == before and r['rows'][0]['verdict'] == 'same' and rope_info(load_model(folder, device='cpu')).original == 256


def test_a_length_outside_the_entry_goes_first_as_in_transformers(tmp_path):
    folder = base(tmp_path, max_position_embeddings=2048, original_max_position_embeddings=256, rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1000., original_max_position_embeddings=512))
    r = doctor(folder)
    assert r['intended']['original'] == 256 and r['rows'][0]['verdict'] == 'same' and any('512 in the entry and 256' in f for f in r['findings'])


@pytest.mark.parametrize('scheme', ['linear', 'ntk', 'yarn', 'yarn_revised', 'llama3', 'ntk_by_parts'])
def test_repair_makes_what_was_intended(scheme, tmp_path):
    folder = base(tmp_path, max_position_embeddings=2048.0, rope_parameters=None, rope_scaling=dict(type='linear', factor=2), rope_theta=1000.)
    want = intended(folder, scaling=scheme, original=256, target=2048, base=1000. if scheme == 'ntk' else None)
    repair(folder, want)
    want_f, want_a = get_scaling(scheme, 8.)(32, 1000., 256)
    m = load_model(folder, device='cpu').model.rotary_emb
    assert torch.allclose(m.inv_freq.double(), want_f, rtol=1e-6) and m.attention_scaling == want_a
    assert read_json(folder/'config.json')['max_position_embeddings'] == 2048 and [r['verdict'] for r in diagnose(folder, want)].count('same') >= 5
    assert not doctor(folder, scaling=scheme, original=256, base=1000.)['findings']


def test_a_repair_that_fails_puts_the_old_file_back(tmp_path, monkeypatch):
    import pose_nb.doctor as module
    folder = base(tmp_path, max_position_embeddings=2048)
    before, want = (folder/'config.json').read_bytes(), intended(folder, scaling='yarn', original=256)
    monkeypatch.setattr(module, 'transformers_5', lambda *a: (_ for _ in ()).throw(RuntimeError('boom')))
    with pytest.raises(RuntimeError): repair(folder, want)
    assert (folder/'config.json').read_bytes() == before and not list(folder.glob('*.bak*'))


RAW = dict(model_type='llama', hidden_size=64, num_attention_heads=2, max_position_embeddings=512)


@pytest.mark.parametrize('raw,finds', [
    (dict(rope_scaling=dict(type='yarn', factor=8., original_max_position_embeddings=64), max_position_embeddings=4096), 'multiplied twice'),
    (dict(max_position_embeddings=512.0), 'not a whole number'), (dict(rope_scaling=dict(type='linear', factor=8)), 'decimal point'),
    (dict(rope_scaling=dict(type='linear', rope_type='yarn', factor=8.)), 'vLLM stops'), (dict(rope_parameters=None), 'null'),
    (dict(rope_scaling=dict(type='linear', factor=8.), rope_parameters=dict(rope_type='linear', factor=4.)), 'different things'),
    (dict(rope_parameters=dict(rope_type='yarn', factor=8.)), 'claimed 512 tokens'), (dict(rope_scaling=dict(LONG)), 'longrope without attention_factor'),
    (dict(rope_scaling=LONG | dict(attention_factor=1.)), 'short_mscale'), (dict(rope_scaling=dict(type='dynamic', factor=2.)), 'three different ways'), (dict(max_sequence_length=64), 'claims another length'),
])
def test_mistakes_are_named(raw, finds): assert any(finds in f for f in findings(RAW | raw)), findings(RAW | raw)


def test_rules_that_cannot_be_run_here():
    "Rules read in the engines' sources, each where it differs from transformers."
    hf = None
    dynamic = RAW | dict(rope_theta=1e4, rope_scaling=dict(rope_type='dynamic', factor=4.))
    plain = NoScaling()(32, 1e4, 512)[0]
    assert torch.equal(vllm(dynamic, 2048, hf).inv_freq, plain) and vllm(dynamic, 2048, hf).length == 2048 and torch.equal(llama_cpp(dynamic, 2048).inv_freq, plain)
    assert torch.allclose(sglang(dynamic, 100).inv_freq, DynamicNTK(4).at(2048, 512)(32, 1e4, 512)[0])                       # also for short inputs
    long = RAW | dict(rope_scaling=LONG | dict(attention_factor=1.3))
    assert vllm(long, 512, hf).attention == pytest.approx(np.sqrt(1 + np.log(8) / np.log(64))) and vllm(long | dict(rope_scaling=long['rope_scaling'] | dict(long_mscale=1.3)), 512, hf).attention == 1.3
    assert vllm(long | dict(original_max_position_embeddings=64), 512, hf).length == 64 and torch.equal(llama_cpp(long, 512).inv_freq, plain)
    yarn = RAW | dict(rope_scaling=dict(rope_type='yarn', factor=8., original_max_position_embeddings=64, attention_factor=1.))
    assert vllm(yarn, 512, hf).attention == 1 and sglang(yarn, 512).attention == llama_cpp(yarn, 512).attention == pytest.approx(1.2079441541679836)
    linear = RAW | dict(rope_scaling=dict(rope_type='linear', factor=8.))
    assert vllm(linear, 512, hf).length == sglang(linear, 512).length == 4096 and llama_cpp(linear, 512).length == 512
    for engine in (lambda r: vllm(r, 512, hf), lambda r: sglang(r, 512)): assert 'TypeError' in engine(RAW | dict(rope_scaling=dict(rope_type='linear', factor=8))).problem
    assert torch.equal(llama_cpp(RAW | dict(model_type='phi', partial_rotary_factor=1., rope_scaling=linear['rope_scaling'], rope_theta=5e5), 512).inv_freq, plain)
    llama3 = RAW | dict(rope_scaling=dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64))
    assert torch.equal(llama_cpp(llama3, 512).inv_freq, Llama3(8)(32, 1e4, 64)[0]) and torch.equal(llama_cpp(llama3 | dict(model_type='qwen2'), 512).inv_freq, plain)
    assert 'KeyError' in llama_cpp(RAW | dict(rope_scaling=dict(rope_type='yarn', factor=8.)), 512).problem


@pytest.mark.parametrize('changes,says', [
    (dict(head_dim='64'), 'cannot make a llama'), (dict(head_dim=0), 'no model can be built'), (dict(num_attention_heads=None, hidden_size=None), ''), (dict(hidden_size=-1), 'cannot make a llama'), (dict(model_type='llava'), 'not a plain causal language model'),
    (dict(text_config={}), 'not a plain'), (dict(model_type='gptj'), 'convert'), (dict(model_type=['x']), 'unknown'), (dict(max_position_embeddings=10**30), 'unknown; pass it with --target'), (dict(rope_parameters=[1]), 'not a dictionary'), (dict(num_hidden_layers=10**30), 'which no model has'), (dict(model_type='t5'), 'not a plain'),
])
def test_a_config_that_makes_no_sense_gets_one_sentence(changes, says, cli, tmp_path):
    folder = base(tmp_path, **changes)
    before = (folder/'config.json').read_bytes()
    for words in (['doctor', folder], ['doctor', folder, '--scaling', 'yarn', '--original', '256', '--fix']):
        r = cli(*words)
        if r.code == 0: continue
        assert r.code == 2 and len(r.err.strip().splitlines()) == 1 and (says in r.err or '--fix' in words), r.err
        assert (folder/'config.json').read_bytes() == before


@pytest.mark.parametrize('record', ['[]', 'null', '{"rope": {"dim": 32}}', '{"rope": {"original": 256, "length": 512, "dim": 32, "rope_parameters": null}}'])
def test_a_record_that_makes_no_sense_gets_one_sentence(record, cli, tmp_path):
    folder = base(tmp_path)
    (folder/'pose_nb.json').write_text(record)
    r = cli('doctor', folder)
    assert r.code == 2 and 'pose_nb.json does not describe' in r.err


def test_other_bad_requests(cli, tmp_path):
    folder = base(tmp_path)
    for words, says in ((['--scaling', 'yarn', '--target', str(2**40), '--original', '256'], '2**24'), (['--scaling', 'yarn', '--scaling-kwargs', '{"factor": 2}', '--original', '256', '--target', '512'], '--factor'), (['--factor', '2'], 'add --scaling'), (['--scaling', 'yarm'], 'choose one of')):
        r = cli('doctor', folder, *words)
        assert r.code == 2 and says in r.err, r.err


def test_families_that_older_transformers_refuse_or_ignore():
    "Seen with transformers 4.57.3: Phi-3 and OLMo 2 accept one form of rope_scaling only, Nemotron reads none."
    from pose_nb.doctor import transformers_4
    yarn = dict(rope_type='yarn', factor=8., original_max_position_embeddings=64)
    for kind in ('phi3', 'olmo2'): assert 'ValueError' in transformers_4(RAW | dict(model_type=kind, rope_scaling=yarn), 512).problem
    assert torch.equal(transformers_4(RAW | dict(model_type='nemotron', rope_scaling=yarn, partial_rotary_factor=1.), 512).inv_freq, NoScaling()(32, 1e4, 512)[0])


@pytest.mark.parametrize('words,says', [
    (['--target', '0'], 'at least 1'), (['--scaling', 'yarn', '--factor', '0'], 'at least 1'), (['--scaling', 'yarn', '--base', '0'], 'base'), (['--scaling', 'yarn', '--original', '4096'], 'shorter than the original'),
    (['--scaling', 'yarn', '--factor', '2'], 'reaches 512 of 2,048'), (['--target', '32', '--scaling', 'yarn'], 'shorter'), (['--original', '0'], 'at least 1'), (['--scaling', 'yarn', '--scaling-kwargs', '{"name": "x"}'], "no option 'name'"),
])
def test_numbers_that_make_no_sense_are_not_bent(words, says, cli, tmp_path):
    out = patch_checkpoint(default_base(), YaRN(8.), 2048, tmp_path/'m')
    r = cli('doctor', out, *words)
    assert r.code == 2 and says in r.err and len(r.err.strip().splitlines()) == 1, r.err


@pytest.mark.parametrize('changes', [
    dict(original_rope_theta='x'), dict(original_rope_theta=0), dict(original_max_position_embeddings='64'), dict(original_max_position_embeddings=[1]), dict(rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1e3, original_max_position_embeddings=0)),
    dict(rope_parameters=dict(rope_type=['yarn'], rope_theta=1e3)), dict(rope_parameters=dict(rope_type='linear', factor=0, rope_theta=1e3)), dict(rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1e3, original_max_position_embeddings=256, attention_factor=10**30)),
    dict(rope_parameters=dict(rope_type='default', rope_theta=1e3, partial_rotary_factor='64')), dict(rope_parameters=dict(rope_type='default', rope_theta=1e3, partial_rotary_factor=1e30)),
    dict(rope_scaling=dict(type='longrope', factor=4., short_factor=[0] * 16, long_factor=[0] * 16)),
])
def test_junk_in_a_config_never_gets_a_traceback(changes, cli, tmp_path):
    folder = base(tmp_path, **changes)
    for words in (['doctor', folder, '--json'], ['doctor', folder, '--scaling', 'yarn', '--original', '256', '--target', '2048', '--json'], ['patch', folder, '--target', '2048', '--original', '256', '--output-dir', tmp_path/'o']):
        r = cli(*words)
        assert r.code in (0, 2) and (r.code == 0 or len(r.err.strip().splitlines()) == 1), r.err
        if r.code == 0 and words[0] == 'doctor': json.loads(r.out, parse_constant=lambda x: pytest.fail(f'{x} is not JSON'))


def test_the_printed_repair_works_as_typed(cli, tmp_path):
    import shlex
    folder = base(tmp_path, 'a b', max_position_embeddings=2048, rope_parameters=dict(rope_type='yarn', factor=8., rope_theta=1000.))
    r = cli('doctor', folder, '--scaling', 'yarn', '--original', '256')
    command = next(l for l in r.out.splitlines() if l.startswith('fix for')).split(': ', 1)[1]
    assert cli(*shlex.split(command)[1:]).code == 0 and doctor(folder)['rows'][0]['verdict'] == 'same'
