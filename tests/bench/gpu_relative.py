"""Relative maps on one GPU: one attention layer in bf16 at 32k and 128k tokens, against plain flash attention and against the definition.

    python tests/bench/gpu_relative.py [--out FILE.json] [--toy]

A layer of 32 query and 8 key heads of 128 channels (the shape of Llama-3-8B), reading a whole text at once, and one token behind it. Time is the median over that of torch's own
causal attention in paired repeats; memory is the peak above what the inputs hold. The last eight queries are compared with the dense reference in float32; the map that changes nothing,
with torch's attention on queries and keys that are rotated as transformers does. `--toy` runs small sizes anywhere.
"""
import argparse, json, time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch, torch.nn.functional as F

from pose_nb.common import environment
from pose_nb.relative import _InLayer, DPE, RelativeMap, Rotation, dense_attention, get_relative, relative_attention, rotate_to

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def clock(f):
    "Seconds, result and peak GiB above what is held now."
    if DEVICE == 'cuda': torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
    start = time.perf_counter(); out = f()
    if DEVICE == 'cuda': torch.cuda.synchronize()
    return time.perf_counter() - start, out, (torch.cuda.max_memory_allocated() - held) / 2**30 if DEVICE == 'cuda' else None


def maps(window, length):
    scales = tuple(min(g, window // 8) for g in (4, 4, 2, 16, 32, 32, 16, 128))
    return [RelativeMap(), *(get_relative(n, window, length) for n in ('self_extend', 'rerope', 'leaky_rerope', 'dca', 'lm_infinite')), DPE(scales, window // 8, 64)]


@torch.inference_mode()
def measure(length, window, heads, kv_heads, repeats):
    "One row per map."
    torch.manual_seed(0); d = 128
    theta = 5e5 ** -(torch.arange(d // 2).float() / (d // 2)).repeat(2).to(DEVICE)
    r = Rotation(theta, 1., torch.arange(d // 2).repeat(2).to(DEVICE), lambda x: torch.cat([-x[..., d // 2:], x[..., :d // 2]], -1))
    q, k, v = (torch.randn(1, h, length, d, device=DEVICE, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    at, rows = torch.arange(length, device=DEVICE)[None], []
    turned = [rotate_to(x, at, r) for x in (q, k)]
    plain = lambda: F.scaled_dot_product_attention(*turned, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    written = lambda: F.scaled_dot_product_attention(turned[0][:, :, -1:], turned[1], v, enable_gqa=True)
    for rel in maps(window, length):
        module = SimpleNamespace(relative=_InLayer(rel, r))
        read = lambda n: relative_attention(module, q[:, :, -n:], k, v, None, d**-.5, at[:, -n:])[0]
        read(length), plain()                                                                   # warm up
        pairs = [(clock(plain), clock(lambda: read(length)), clock(written), clock(lambda: read(1))) for _ in range(repeats)]
        out, stock, many = pairs[0][1][1], pairs[0][0][1], heads // kv_heads
        full = [t.float() for t in (q[:, ::many, -8:], k, v)]
        slow = torch.cat([dense_attention(rel, full[0][:, h:h + 1], full[1][:, h:h + 1], full[2][:, h:h + 1], at[0, -8:], at[0], r, d**-.5) for h in range(kv_heads)], 1).transpose(1, 2)
        rows.append(dict(length=length, map=rel.name, settings=asdict(rel) if rel.name != 'none' else {}, reading=float(np.median([b[0] / a[0] for a, b, _, _ in pairs])), writing=float(np.median([b[0] / a[0] for _, _, a, b in pairs])),
                         plain_seconds=float(np.median([p[0][0] for p in pairs])), peak_gib=pairs[0][1][2], plain_peak_gib=pairs[0][0][2], off_from_definition=(out[:, -8:, ::many].float() - slow).abs().max().item(),
                         off_from_flash=(out - stock).abs().max().item() if rel.name == 'none' else None))
        print(rows[-1], flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out'); p.add_argument('--toy', action='store_true')
    a = p.parse_args()
    rows = measure(1024, 256, 4, 2, 3) if a.toy else measure(2**15, 8192, 32, 8, 5) + measure(2**17, 8192, 32, 8, 3)
    text = json.dumps(dict(rows=rows, environment=environment()), indent=2)
    if a.out: Path(a.out).write_text(text + '\n')
    print(text)


if __name__ == '__main__': main()
