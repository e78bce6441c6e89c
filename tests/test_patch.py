"""Another rotation without training: the same weights, linked; nothing left behind by what cannot be done."""
import json, os

import pytest, torch
from conftest import TARGET, WINDOW, make_model, make_tokenizer, snapshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from pose_nb.common import read_json
from pose_nb.interpolation import LongRoPE, SCALINGS, get_scaling
from pose_nb.model import load_model, rope_info


def positions(): return dict(position_ids=torch.arange(TARGET - 32, TARGET)[None], attention_mask=torch.ones(1, 32, dtype=torch.long))


@pytest.mark.parametrize('name', SCALINGS)
@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gptj', 'codegen'])
def test_a_patched_checkpoint_rotates_as_asked_and_shares_its_weights(kind, name, cli, checkpoint, tmp_path):
    base, out = checkpoint(kind), tmp_path/'out'
    dim = 8 if kind in ('gptj', 'codegen') else 16
    kwargs = json.dumps(dict(long_factor=[1. + i for i in range(dim // 2)])) if name == 'longrope' else None
    r = cli('patch', base, '--target', TARGET, '--output-dir', out, '--scaling', name, *(['--scaling-kwargs', kwargs] if kwargs else []))
    assert r.code == 0, r.err
    scheme = LongRoPE(4, [1. + i for i in range(dim // 2)]) if kwargs else get_scaling(name, TARGET / WINDOW)
    stock, info = AutoModelForCausalLM.from_pretrained(out), rope_info(load_model(out, device='cpu'))
    assert (info.original, info.length) == (WINDOW, TARGET) and (info.scaling == scheme or name == 'abf')
    assert torch.allclose(stock.model.rotary_emb.inv_freq.double(), scheme(dim, 1e4, WINDOW)[0], rtol=1e-6)
    assert AutoTokenizer.from_pretrained(out).model_max_length == TARGET
    if kind in ('llama', 'qwen2'): assert (out/'model.safetensors').stat().st_ino == (base/'model.safetensors').stat().st_ino
    assert read_json(out/'pose_nb.json')['rope']['scaling'] == info.scaling.name


def test_sharded_weights_subfolders_and_copies(cli, tmp_path):
    base, out = tmp_path/'base', tmp_path/'out'
    make_model().save_pretrained(base, max_shard_size='20KB'); make_tokenizer().save_pretrained(base)
    (base/'original').mkdir(); (base/'original'/'params.json').write_text('{}')
    shards = sorted(p.name for p in base.glob('*.safetensors'))
    assert len(shards) > 1
    before = snapshot(base)
    assert cli('patch', base, '--target', TARGET, '--output-dir', out, '--copy').code == 0
    assert sorted(p.name for p in out.glob('*.safetensors')) == shards and (out/'original'/'params.json').exists()
    assert all((out/s).stat().st_ino != (base/s).stat().st_ino for s in shards)
    assert snapshot(base) == before, 'the source is left alone'
    assert rope_info(load_model(out, device='cpu')).length == TARGET


@pytest.mark.parametrize('options,says', [
    (['--target', '32'], 'shorter than the original'), (['--target', '256', '--scaling', 'longrope'], 'long_factor'),
    (['--target', '256', '--scaling', 'longrope', '--scaling-kwargs', '{"long_factor": [1, 2]}'], 'rotates 8 pairs'), (['--target', '256', '--scaling-kwargs', '{"beta": 1}'], "no option 'beta'"),
    (['--target', '256', '--scaling-kwargs', '[1]'], 'not a JSON object'), (['--target', '256', '--scaling-kwargs', '{"beta_fast": "x"}'], 'beta_fast'), (['--target', '256', '--scaling-kwargs', '{"factor": 2}'], '--factor'), (['--target', '256', '--factor', '2'], 'reaches 128 of 256'),
    (['--target', '256', '--original', '999'], '999'), (['--target', str(2**25)], 'float32'), (['--target', '256', '--scaling', 'abf', '--scaling-kwargs', '{"rope_theta": 100}'], 'lower the base'),
])
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(options, says, cli, checkpoint, tmp_path):
    r = cli('patch', checkpoint(), '--output-dir', tmp_path/'out', *options)
    assert r.code == 2 and says in r.err and len(r.err.strip().splitlines()) == 1 and not (tmp_path/'out').exists()


def test_it_does_not_write_into_a_folder_in_use(cli, checkpoint, tmp_path):
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'mine.txt').write_text('x')
    r = cli('patch', checkpoint(), '--target', TARGET, '--output-dir', tmp_path/'out')
    assert r.code == 2 and 'holds files' in r.err and os.listdir(tmp_path/'out') == ['mine.txt']
