"""The main promise, end to end: `pose_nb demo` on this machine reaches its targets, within its memory, and its result loads without pose_nb."""
import json, subprocess, sys
from pathlib import Path

import pytest

LENGTHS = (256, 512, 1024, 2048)

RUN = """
import resource, sys
from pose_nb.cli import main
code = main(['demo', '--output-dir', sys.argv[1], '--no-progress', '--json'])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, file=sys.stderr)
sys.exit(code)
"""

STOCK = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(m.startswith('pose_nb') for m in sys.modules)
torch.save(model(torch.arange(1, 400)[None]).logits.detach(), sys.argv[2])
"""


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')/'out'
    r = subprocess.run([sys.executable, '-c', RUN, str(out)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return {x['model']: x for x in json.loads(r.stdout)['rows']}, out, float(r.stderr.strip().splitlines()[-1])


def test_the_base_is_good_inside_its_window_and_lost_at_the_target(result):
    base = result[0]['base']
    assert base['passkey 256'] >= .9 and base['passkey 2048'] <= .1
    assert base['ppl 2048'] > 1.5 * base['ppl 256']


def test_pose_finds_keys_at_every_length(result):
    pose = result[0]['pose']
    assert sum(pose[f'passkey {n}'] for n in LENGTHS) / 4 >= .9 and pose['passkey 2048'] >= .8


def test_pose_keeps_perplexity_flat(result):
    pose = result[0]['pose']
    assert pose['ppl 2048'] <= 1.15 * pose['ppl 256']


def test_two_gibibytes_are_enough(result): assert result[2] < 2


def test_the_result_loads_in_a_process_without_pose_nb_with_identical_logits(result, tmp_path):
    import torch
    from pose_nb.model import load_model
    out = result[1]/'pose'
    subprocess.run([sys.executable, '-c', STOCK, str(out), str(tmp_path/'l.pt')], check=True, capture_output=True, cwd=tmp_path)
    with torch.no_grad(): ours = load_model(out, device='cpu')(torch.arange(1, 400)[None]).logits
    assert torch.equal(torch.load(tmp_path/'l.pt', weights_only=True), ours)
    assert all((out/n).exists() for n in ('README.md', 'pose_nb.json', 'eval/ppl.json', 'eval/passkey.json', 'loss.svg'))
