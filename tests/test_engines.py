"""Predictions of the doctor against the engines themselves. Opt-in: `make test-engines` installs them under .engines/ and sets POSE_NB_ENGINES."""
import os, subprocess
from pathlib import Path

import numpy as np, pytest, torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

from pose_nb.doctor import diagnose, intended, transformers_4
from pose_nb.common import read_json
from pose_nb.export import patch_checkpoint, save_extended
from pose_nb.interpolation import LongRoPE, SCALINGS, get_scaling
from pose_nb.model import default_base, load_model, set_scaling

ENGINES = Path(os.environ.get('POSE_NB_ENGINES', '.engines'))
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif('POSE_NB_ENGINES' not in os.environ, reason='set POSE_NB_ENGINES, or run make test-engines')
SMALL = dict(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, initializer_range=.2, bos_token_id=0, eos_token_id=1)
KINDS = dict(llama=LlamaConfig(**SMALL), mistral=MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=None), qwen2=Qwen2Config(**SMALL, num_key_value_heads=2),
             gpt_neox=GPTNeoXConfig(**SMALL, rotary_pct=.25), phi=PhiConfig(**SMALL, partial_rotary_factor=.5))
OLDER = {'4.57': '4.57.3', '4.46': '4.46.3'}
TARGET = 512


def python(name): return str(ENGINES/name/'bin'/'python')


def scheme(name, dim):
    if name == 'longrope': return LongRoPE(8, np.geomspace(1, 8, dim // 2).tolist(), [1.] * (dim // 2))
    return get_scaling(name, 8.)


def written(kind, name, folder):
    "A checkpoint that this package writes."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    dim = 2 * model.base_model.rotary_emb.inv_freq.numel()
    return save_extended(set_scaling(model, scheme(name, dim), TARGET), make_tokenizer(), folder)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    "{(kind, scaling): folder}, each with what the older versions made of it beside it; one process per version."
    d = tmp_path_factory.mktemp('checkpoints')
    made = {(k, n): written(k, n, d/f'{k}-{n}') for k in KINDS for n in SCALINGS}
    for v in OLDER.values(): subprocess.run([python(f'transformers-{v}'), str(HERE/'run_older.py'), str(TARGET), *map(str, made.values())], check=True, capture_output=True)
    return made


@pytest.mark.parametrize('name', SCALINGS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('version', OLDER)
def test_the_doctor_predicts_older_transformers(version, kind, name, checkpoints):
    out = checkpoints[kind, name]
    got = np.load(f'{out}-{OLDER[version]}.npz')
    prediction, row = transformers_4(read_json(out/'config.json'), TARGET, version), next(r for r in diagnose(out, intended(out)) if version in r['engine'])
    assert bool(prediction.problem) == ('error' in got), (prediction.problem, got)
    if 'error' in got: return
    assert np.allclose(got['inv_freq'], prediction.inv_freq.numpy(), rtol=1e-5) and np.isclose(got['attention'], prediction.attention, rtol=1e-6)
    ids, pos = torch.arange(48)[None] + 2, torch.arange(TARGET - 48, TARGET)[None]
    with torch.no_grad(): ours = load_model(out, device='cpu')(ids, position_ids=pos, attention_mask=torch.ones_like(ids)).logits.numpy()
    close = np.abs(ours - got['logits']).max() < 1e-3 * np.abs(ours).max()
    assert close == (row['verdict'] in ('same', 'short')), (row, np.abs(ours - got['logits']).max())


@pytest.mark.parametrize('name', ['none', 'linear', 'ntk', 'ntk_by_parts', 'yarn', 'yarn_revised', 'abf'])
def test_llama_cpp_computes_the_same_logits(name, tmp_path):
    "The keys are those of llama.cpp's converter; lists of ratios go into a tensor, which the converter cannot write."
    from gguf_writer import write_gguf
    tokens = np.random.default_rng(0).integers(3, 1000, 2048)
    np.save(tmp_path/'t.npy', tokens)
    out = patch_checkpoint(default_base(), get_scaling(name, 8. if name != 'none' else 1.), 2048, tmp_path/'m')
    write_gguf(out, tmp_path/'m.gguf')
    subprocess.run([python('llama-cpp'), str(HERE/'run_llama_cpp.py'), str(tmp_path/'m.gguf'), str(tmp_path/'t.npy'), str(tmp_path/'o.npy')], check=True, capture_output=True)
    theirs = np.load(tmp_path/'o.npy')
    with torch.no_grad(): ours, plain = (load_model(m, device='cpu')(torch.tensor(tokens)[None]).logits[0].numpy() for m in (out, default_base()))
    assert np.abs(ours - theirs).max() < 5e-3 and (name == 'none' or np.abs(plain - theirs).max() > 1)
