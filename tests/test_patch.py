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


def broken(base, to, how):
    import shutil
    shutil.copytree(base, to)
    w = to/'model.safetensors'
    if how == 'missing': w.unlink()
    if how == 'cut': w.write_bytes(w.read_bytes()[:500])
    if how == 'dangling': w.unlink(); w.symlink_to(to/'nowhere')
    if how == 'shard':
        shutil.rmtree(to); make_model().save_pretrained(to, max_shard_size='20KB'); make_tokenizer().save_pretrained(to)
        sorted(to.glob('*.safetensors'))[0].unlink()
    if how == 'tokenizer': (to/'tokenizer_config.json').write_text('[]')
    return to


@pytest.mark.parametrize('how,says', [('missing', 'no weights'), ('cut', 'damaged'), ('dangling', 'link to a file that is not there'), ('shard', 'lacks 1 of the weight files'), ('tokenizer', 'not the config of a tokenizer')])
def test_a_checkpoint_that_could_not_be_loaded_is_not_patched(how, says, cli, checkpoint, tmp_path):
    source = broken(checkpoint(), tmp_path/'base', how)
    if how == 'dangling': make_model().save_pretrained(source/'x'); (source/'x'/'model.safetensors').rename(source/'other.safetensors')
    r = cli('patch', source, '--target', TARGET, '--output-dir', tmp_path/'out')
    assert r.code == 2 and says in r.err and not (tmp_path/'out').exists(), r.err


def test_a_folder_that_was_there_before_stays(cli, checkpoint, tmp_path):
    (tmp_path/'mine').mkdir(mode=0o750)
    r = cli('patch', checkpoint(), '--target', TARGET, '--output-dir', tmp_path/'mine', '--scaling', 'longrope', '--scaling-kwargs', '{"long_factor": [1]}')
    assert r.code == 2 and (tmp_path/'mine').is_dir() and not any((tmp_path/'mine').iterdir()) and (tmp_path/'mine').stat().st_mode & 0o777 == 0o750


def test_files_below_are_taken_whatever_their_name(cli, checkpoint, tmp_path):
    import shutil
    shutil.copytree(checkpoint(), tmp_path/'base'); (tmp_path/'base'/'onnx').mkdir(); (tmp_path/'base'/'onnx'/'config.json').write_text('{}')
    assert cli('patch', tmp_path/'base', '--target', TARGET, '--output-dir', tmp_path/'out').code == 0
    assert (tmp_path/'out'/'onnx'/'config.json').exists()


@pytest.mark.parametrize('kwargs', ['{"truncate": "no"}', '{"truncate": null}', '{"attention_factor": 1e300}', '{"beta_fast": 1%s}' % ('0' * 400), '[' * 100_000, '{"name": "x"}'])
def test_more_fields_that_make_no_sense(kwargs, cli, checkpoint, tmp_path):
    r = cli('patch', checkpoint(), '--target', TARGET, '--output-dir', tmp_path/'out', '--scaling-kwargs', kwargs)
    assert r.code == 2 and len(r.err.strip().splitlines()) == 1 and len(r.err) < 700 and not (tmp_path/'out').exists()
    r = cli('patch', checkpoint(), '--target', TARGET, '--output-dir', tmp_path/'out', '--original', '1', '--scaling', 'longrope', '--scaling-kwargs', '{"long_factor": [1,1,1,1,1,1,1,1]}')
    assert r.code == 2 and not (tmp_path/'out').exists()
