"""Evaluation on one GPU: time and peak memory of perplexity and passkey retrieval at 32k, 128k and 512k tokens, and equality with the CPU.

    python tests/bench/gpu_eval.py [--out FILE.json] [--toy]

A random model of 1.1 billion parameters in bf16 (the shape of TinyLlama), rescaled by YaRN for each length; each measurement runs in a process of its own,
so that one that runs out of memory ends alone. Equality is that of the embedded miniature model on GPU and CPU, in float32. `--toy` runs tiny models anywhere.
"""
import argparse, json, subprocess, sys, time
from pathlib import Path

import numpy as np, torch

SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def build(length, toy):
    from transformers import LlamaConfig, LlamaForCausalLM
    from pose_nb.interpolation import YaRN
    from pose_nb.model import cast_weights, set_scaling
    torch.manual_seed(0)
    window = min(4096, length // 2)
    with torch.device(DEVICE): model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, max_position_embeddings=window, **(TOY if toy else SHAPE)))
    set_scaling(model, YaRN(length / window), length)
    return cast_weights(model, torch.bfloat16).eval()


def one(what, length, toy):
    "Seconds and peak GiB above the model, of one document read in one window, or of passkeys at five depths."
    from pose_nb.model import default_base, load_tokenizer
    from pose_nb.perplexity import perplexity
    from pose_nb.retrieval import passkey
    model, document = build(length, toy), np.random.default_rng(0).integers(5, 32_000, length)
    def run():
        if what == 'ppl': return perplexity(model, [document], (length,), stride=length, bos=False, progress=False)
        return passkey(model, load_tokenizer(default_base()), (length,), (0, .25, .5, .75, 1), trials=2, progress=False)
    small = document[:256]; perplexity(model, [small], (256,), stride=256, bos=False, progress=False)      # warm up
    if DEVICE == 'cuda': torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
    start = time.perf_counter(); r = run()
    if DEVICE == 'cuda': torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, peak_gib=(torch.cuda.max_memory_allocated() - held) / 2**30 if DEVICE == 'cuda' else None, nll=float(r.rows[0].nll))


def equal():
    "Largest differences of the miniature base between this device and the CPU: loss per token, and replies that differ."
    from pose_nb.data import stdlib_documents
    from pose_nb.model import default_base, load_model, load_tokenizer
    from pose_nb.perplexity import perplexity, tokenize_documents
    from pose_nb.retrieval import passkey
    tok, out = load_tokenizer(default_base()), []
    docs = tokenize_documents(list(stdlib_documents('heldout').values())[:4], tok)
    for device in (DEVICE, 'cpu'):
        m = load_model(default_base(), device=device)
        out.append(([np.nan_to_num(t) for t in perplexity(m, docs, (256, 512), max_tokens=600, progress=False, keep_short=True).rows[-1].token_nll], [t['reply'] for t in passkey(m, tok, (256, 512), trials=20, progress=False).trials]))
    (a, x), (b, y) = out
    return dict(nll_differs_by=max(float(np.abs(p - q).max()) for p, q in zip(a, b)), replies_differ=sum(p != q for p, q in zip(x, y)), replies=len(x))


def call(**kw):
    "Run one measurement in a process of its own."
    r = subprocess.run([sys.executable, __file__, '--one', json.dumps(kw)], capture_output=True, text=True)
    if r.returncode == 0: return kw | json.loads(r.stdout.strip().splitlines()[-1])
    return kw | dict(failed='out of memory' if 'out of memory' in r.stderr else r.stderr.strip().splitlines()[-1][:300])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out'); p.add_argument('--toy', action='store_true'); p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return print(json.dumps(one(**json.loads(a.one))))
    from pose_nb.common import environment
    rows = []
    for length in (512, 1024) if a.toy else (2**15, 2**17, 2**19):
        for what in ('ppl', 'passkey'): rows.append(call(what=what, length=length, toy=a.toy)); print(rows[-1], flush=True)
    text = json.dumps(dict(rows=rows, equality=equal(), environment=environment()), indent=2)
    if a.out: Path(a.out).write_text(text + '\n')
    print(text)


if __name__ == '__main__': main()
