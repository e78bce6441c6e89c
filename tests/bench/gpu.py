"""Training on one GPU: tokens per second, MFU and peak memory of PoSE and Full-length, and what attention implementations change.

    python tests/bench/gpu.py [--out FILE.json] [--models 125M,1B,7B] [--toy]

Random models in bf16 with a window of 4,096 tokens. Each configuration runs `pose_nb.train.train`, both guards included, in a process of its own,
so that one that runs out of memory ends alone. A 7B model trains by LoRA beside a frozen bf16 base. `--toy` runs tiny models anywhere: does it work?
"""
import argparse, json, statistics, subprocess, sys
from pathlib import Path

import numpy as np, torch

SHAPES = {'125M': dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
          '1B': dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
          '7B': dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)}
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
ROWS = {'125M': 16, '1B': 8, '7B': 4}


def build(name, window, target, attn, toy):
    "A random model, rescaled for the target; LoRA beside it if it is large."
    from transformers import LlamaConfig, LlamaForCausalLM
    from pose_nb.interpolation import YaRN
    from pose_nb.lora import LoraSettings, add_lora, inner_model
    from pose_nb.model import cast_weights, set_scaling
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=32_000, max_position_embeddings=window, **(TOY if toy else SHAPES[name])), attn_implementation=attn)
    set_scaling(model, YaRN(target / window), target)
    return inner_model(add_lora(cast_weights(model, torch.bfloat16), LoraSettings(r=16))) if name == '7B' else model


def one(name, method, target, attn, rows, steps, toy, window):
    "Train a few steps. -> tokens per second, MFU and memory"
    from pose_nb.data import TokenStore, WindowDataset
    from pose_nb.positions import FullLength, PoSE
    from pose_nb.train import TrainSettings, train
    from pose_nb.watch import Monitor
    model = build(name, window, target, attn, toy)
    tokens = np.random.default_rng(0).integers(0, 32_000, 4 * target + 2_000_000).astype(np.int32)
    sampler = PoSE(window, target) if method == 'pose' else FullLength(target)
    data = WindowDataset(TokenStore(tokens, np.array([0, len(tokens)])), sampler)
    settings = TrainSettings(max_steps=steps, per_device_train_batch_size=rows, bf16=True, gradient_checkpointing=True, learning_rate=1e-5, dataloader_num_workers=0 if toy else 2)
    rows = train(model, data, settings, progress=False, monitor=Monitor(model, target, settings)).history[steps // 3:]
    return dict(tokens_per_second=statistics.median(r['tokens_per_second'] for r in rows), mfu=statistics.median(r.get('mfu', 0) for r in rows), peak_gib=rows[-1]['peak_gib'], data_share=sum(r['data_seconds'] for r in rows) / sum(r['seconds'] for r in rows))


def equal(name, window, target, attns, toy):
    "Largest difference of the logits of one PoSE window between attention implementations, relative to the largest logit, in bf16."
    from pose_nb.data import TokenStore, WindowDataset, collate
    from pose_nb.model import cast_weights
    from pose_nb.positions import PoSE
    tokens = np.random.default_rng(0).integers(0, 32_000, 10 * window).astype(np.int32)
    batch = collate([WindowDataset(TokenStore(tokens, np.array([0, len(tokens)])), PoSE(window, target))[0]])
    out = {}
    for a in attns:
        model = cast_weights(build(name, window, target, a, toy), torch.bfloat16).eval()
        with torch.no_grad(): out[a] = model(**{k: v.to(model.device) for k, v in batch.items() if k in ('input_ids', 'position_ids', 'attention_mask')}, use_cache=False).logits.float().cpu()
    ref = out[attns[0]]
    return {a: ((o - ref).abs().max() / ref.abs().max()).item() for a, o in out.items()}


def call(**kw):
    "Run one configuration in a process of its own."
    r = subprocess.run([sys.executable, __file__, '--one', json.dumps(kw)], capture_output=True, text=True)
    if r.returncode == 0: return kw | json.loads(r.stdout.strip().splitlines()[-1])
    return kw | dict(failed='out of memory' if 'memory ran out' in r.stderr or 'out of memory' in r.stderr else r.stderr.strip().splitlines()[-1][:300])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out'); p.add_argument('--models', default='125M,1B,7B'); p.add_argument('--toy', action='store_true'); p.add_argument('--steps', type=int, default=12)
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        kw = json.loads(a.one)
        return print(json.dumps(equal(**{k: v for k, v in kw.items() if k != 'what'}) if kw.get('what') == 'equal' else one(**kw)))
    from importlib.util import find_spec
    from pose_nb.common import environment
    window, toy = (64, True) if a.toy else (4096, False)
    attns = ['sdpa'] + ['flash_attention_2'] * bool(find_spec('flash_attn')) + ['flex_attention'] * torch.cuda.is_available() + ['eager'] * toy
    common, rows, models = dict(steps=6 if toy else a.steps, toy=toy, window=window), [], a.models.split(',')
    for name in models:
        for target in [2, 8, 32, 256]: rows.append(call(name=name, method='pose', target=target * window, attn='sdpa', rows=2 if toy else ROWS[name], **common)); print(rows[-1], flush=True)
        for target in [2, 4, 8, 16, 32]:
            rows.append(call(name=name, method='full', target=target * window, attn='sdpa', rows=1, **common)); print(rows[-1], flush=True)
            if 'failed' in rows[-1]: break
        for attn in attns[1:]: rows.append(call(name=name, method='pose', target=8 * window, attn=attn, rows=2 if toy else ROWS[name], **common)); print(rows[-1], flush=True)
    same = call(what='equal', name=models[0], window=window, target=8 * window, attns=attns, toy=toy)
    text = json.dumps(dict(rows=rows, logits_differ_by=same, environment=environment()), indent=2)
    if a.out: Path(a.out).write_text(text + '\n')
    print(text)


if __name__ == '__main__': main()
