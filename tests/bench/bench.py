"""Ratios of time and memory, each measured in one run on this machine.

    python tests/bench/bench.py [--quick] [--out FILE.json]

Times are medians of interleaved repeats (A B C A B C ...), so that a machine whose speed drifts slows all of them alike.
Peak memory is that of a fresh process per configuration, less the same process before its first step.
"""
import argparse, itertools, json, os, random, statistics, subprocess, sys, time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import numpy as np, torch

WINDOW, ROWS = 256, 4
MALLOC = dict(MALLOC_MMAP_THRESHOLD_=str(2**25), MALLOC_TRIM_THRESHOLD_=str(2**32))   # glibc keeps freed memory, so that no side pays for page faults
CUDA = torch.cuda.is_available()


def model_and_step(kind, multiple, window=WINDOW, rows=ROWS):
    "A function that does one training step: draw windows, forward, backward, AdamW."
    from transformers import LlamaConfig, LlamaForCausalLM
    from pose_nb.data import TokenStore, WindowDataset, collate
    from pose_nb.positions import Contiguous, FullLength, PoSE
    from pose_nb.train import LossModel, label_weight
    torch.manual_seed(0)
    device = 'cuda' if CUDA else 'cpu'
    model = LossModel(LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
                                                   max_position_embeddings=window*max(multiple, 1))).to(device).train())
    tokens = np.random.default_rng(0).integers(0, 1024, 600_000).astype(np.int32)
    target = window * multiple
    sampler = {'pose': lambda: PoSE(window, target), 'contiguous': lambda: Contiguous(window, window), 'full': lambda: FullLength(target)}[kind]()
    data = WindowDataset(TokenStore(tokens, np.arange(0, 600_001, 20_000)), sampler)
    opt, state = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), dict(i=0)
    def step():
        batch = {k: v.to(device) for k, v in collate([data[state['i'] + j] for j in range(rows)]).items()}
        state['i'] += rows
        (model(batch) / label_weight(batch)).backward()
        opt.step(); opt.zero_grad(set_to_none=True)
        if CUDA: torch.cuda.synchronize()
    return step


def interleaved(steps, repeats, warm=2):
    "{name: times in seconds}, the steps taken in turn."
    times = {n: [] for n in steps}
    for r in range(repeats + warm):
        for n, f in steps.items():
            t = time.perf_counter(); f(); dt = time.perf_counter() - t
            if r >= warm: times[n].append(dt)
    return times


def paired_ratio(a, b):
    "Median of the ratios a/b, pair by pair."
    return statistics.median(x / y for x, y in zip(a, b))


def peak_of(*words):
    "Peak memory in MiB that a fresh process needs above its start, by calling this file with `--peak`."
    env = {k: v for k, v in os.environ.items() if k not in MALLOC}
    out = subprocess.run([sys.executable, __file__, '--peak', *map(str, words)], capture_output=True, text=True, check=True, env=env).stdout
    return float(out.strip().splitlines()[-1])


def proc_status(key):
    "A memory figure of this process in MiB, from Linux's /proc/self/status."
    return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1]) / 1024


def peak_above(f, repeats=2):
    "Peak MiB that calling `f` needs above what is held before (GPU memory if there is a GPU, else resident memory)."
    if CUDA:
        torch.cuda.reset_peak_memory_stats(); start = torch.cuda.memory_allocated() / 2**20
    else:
        Path('/proc/self/clear_refs').write_text('5'); start = proc_status('VmRSS')   # 5 resets the high-water mark
    for _ in range(repeats): f()
    return (torch.cuda.max_memory_allocated() / 2**20 if CUDA else proc_status('VmHWM')) - start


def peak_of_tensors(f):
    "Most bytes of all tensors together while `f` runs, above what was held before: counted by torch, so that it does not depend on what the C library keeps."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(itertools.accumulate(b for _, b in events))


def peak_step(kind, multiple):
    return peak_above(model_and_step(kind, int(multiple)))


def peak_loss(kind, tokens=4096, vocab=32_000, width=128):
    "Peak memory of the loss of one window, forwards and backwards."
    from pose_nb.train import chunked_loss
    head, hidden = torch.nn.Linear(width, vocab, bias=False), torch.randn(1, tokens, width, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))
    naive = lambda: torch.nn.functional.cross_entropy(head(hidden)[0, :-1].float(), labels[0, 1:], reduction='sum')
    return peak_above(lambda: (chunked_loss(hidden, head, labels) if kind == 'chunked' else naive()).backward(), 1)


def bench_steps(repeats):
    "PoSE at 2x to 512x, Full-length at 2x to 8x (Figure 3's analogue)."
    configs = [('pose', m) for m in (2, 8, 64, 512)] + [('full', m) for m in (2, 4, 8)]
    times = interleaved({c: model_and_step(*c) for c in configs}, repeats)
    base = times['pose', 2]
    rows = [dict(method=k, target=f'{m}x', step_time=paired_ratio(times[k, m], base), memory_mib=peak_of(k, m)) for k, m in configs]
    for r in rows: r['memory'] = r['memory_mib'] / rows[0]['memory_mib']
    return rows


class Clock:
    "A dataset that notes when each of its examples is asked for, so that loops which cannot be stepped from outside can be timed alike."
    def __init__(self, data): self.data, self.asked = data, {}
    def __getitem__(self, i): self.asked[i] = time.perf_counter(); return self.data[i]


VOCAB = 1024

def small_model(vocab=None):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab or VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=8*WINDOW)).to('cuda' if CUDA else 'cpu').train()


def small_data():
    from pose_nb.data import TokenStore, WindowDataset
    from pose_nb.positions import PoSE
    tokens = np.random.default_rng(0).integers(0, 1024, 600_000).astype(np.int32)
    return WindowDataset(TokenStore(tokens, np.arange(0, 600_001, 20_000)), PoSE(WINDOW, 8*WINDOW))


def run_bare(data, steps, rows=ROWS):
    "The limit: forward pass with the model's own loss, backward pass, clipping, AdamW, and nothing else."
    from pose_nb.data import collate
    model = small_model()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for t in range(steps):
        batch = {k: v.to(model.device) for k, v in collate([data[t*rows + j] for j in range(rows)]).items() if k != 'loss_weights'}
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad(set_to_none=True)


def run_ours(data, steps, rows=ROWS):
    "`train` as `extend` calls it: guards, log file, progress, monitor."
    import tempfile
    from pose_nb.train import TrainSettings, train
    from pose_nb.watch import Monitor
    settings, model = TrainSettings(max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-4, warmup_steps=0), small_model()
    with tempfile.TemporaryDirectory() as d: train(model, data, settings, d, progress=False, monitor=Monitor(model, 8*WINDOW, settings, output_dir=d))


def run_trainer(data, steps, rows=ROWS):
    "transformers' Trainer on the same windows, with its defaults."
    import tempfile
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging
    from pose_nb.trainer import RunView
    logging.set_verbosity_error(); logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as d:
        args = TrainingArguments(d, max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-4, disable_tqdm=True, use_cpu=not CUDA, save_strategy='no', train_sampling_strategy='sequential', dataloader_pin_memory=CUDA)
        Trainer(small_model(), args, train_dataset=RunView(data, steps*rows)).train()


LOOPS = dict(bare=run_bare, pose_nb=run_ours, Trainer=run_trainer)


def step_time(run, steps, warm=5):
    "Seconds per step of a loop, between the examples it asks for, data included."
    clock = Clock(small_data())
    run(clock, steps)
    return (clock.asked[(steps - 1)*ROWS] - clock.asked[warm*ROWS]) / (steps - 1 - warm)


def bench_loops(repeats, steps=40):
    "A bare loop, this package's and transformers' Trainer on the same windows."
    times = {n: [] for n in LOOPS}
    for _ in range(repeats):
        for n, run in LOOPS.items(): times[n].append(step_time(run, steps))
    peak = {n: peak_of('loop', n) for n in LOOPS}
    def row(n):
        r = [a / b for a, b in zip(times[n], times['bare'])]
        return dict(loop=n, time=statistics.median(r), quartile_low=statistics.quantiles(r, n=4)[0], quartile_high=statistics.quantiles(r, n=4)[2], memory_mib=peak[n], memory=peak[n] / peak['bare'], runs=len(r))
    return [row(n) for n in LOOPS]


def bench_overhead(repeats):
    "A PoSE step against the same step with contiguous positions."
    t = interleaved({'pose': model_and_step('pose', 8), 'contiguous': model_and_step('contiguous', 1)}, repeats)
    r = [a / b for a, b in zip(t['pose'], t['contiguous'])]
    q = statistics.quantiles(r, n=4)
    return [dict(pose_over_contiguous=statistics.median(r), quartile_low=q[0], quartile_high=q[2], pairs=len(r))]


def loop_draw(ids, window, target):
    "One example as the released preprocessing draws it: `random.randint`, list slices, positions moved in a tensor."
    n = min(len(ids), window)
    first, end, skip = random.randint(1, (n + 1) // 2), random.randint(n, len(ids)), random.randint(0, target - n)
    positions = torch.arange(n)
    positions[first:] += skip
    return ids[:first] + ids[end - (n - first):end], positions


def bench_draw(repeats, window=2048, target=16_384, n=128):
    "Time per example of the vectorised draw and of the loop, up to what each returns and up to the two arrays of a batch."
    from pose_nb.positions import PoSE
    sampler, ids, lens = PoSE(window, target, first_chunk='code'), list(range(5*window)), np.full(n, 5*window)
    rng, tokens = np.random.default_rng(0), np.array(ids)
    def draw(): return sampler.batch(lens, rng)
    def draw_batch():
        w = draw()
        return tokens[w.input_index], w.position_ids
    def loop(): return [loop_draw(ids, window, target) for _ in range(n)]
    def loop_batch():                                                     # the release's collator does the same three times per example
        x, p = zip(*loop())
        return torch.stack([torch.tensor(i) for i in x]), torch.stack(p)
    def floor(): return [np.full((n, window), 1) for _ in range(2)]
    todo = {'sampler: token indices and positions': draw, 'sampler: batch of tokens and positions': draw_batch,
            'loop: a list and a tensor each': loop, 'loop: batch of tokens and positions': loop_batch, 'only filling two arrays': floor}
    t = interleaved(todo, repeats)
    return [dict(what=k, us_per_example=statistics.median(v)/n*1e6, against_draw=paired_ratio(v, t[list(todo)[0]]), against_draw_of_batch=paired_ratio(v, t[list(todo)[1]])) for k, v in t.items()]


def bench_loss():
    "Peak memory of the loss of 4,096 tokens at two vocabularies."
    rows = []
    for vocab in (32_000, 128_256):
        naive, chunked = (peak_of(f'loss-{vocab}', kind) for kind in ('naive', 'chunked'))
        rows += [dict(vocabulary=vocab, loss='naive', peak_mib=naive, ratio=1.), dict(vocabulary=vocab, loss='chunked', peak_mib=chunked, ratio=chunked / naive)]
    return rows


def official_perplexity(model, documents, length, stride, bos=0):
    "Perplexity as released loops measure it: one window at a time, BOS in front, logits of every token, labels -100 before the scored ones."
    total = scored = 0
    for d in documents:
        done = 0
        for begin in range(0, len(d), stride):
            end = min(begin + length - 1, len(d)); fresh = end - done
            ids = torch.tensor(np.r_[bos, d[begin:end]], device=model.device)[None]
            labels = ids.clone(); labels[:, :-fresh] = -100
            with torch.no_grad(): total += model(ids, labels=labels).loss.item() * fresh
            scored, done = scored + fresh, end
            if end == len(d): break
    return float(np.exp(total / scored))


READERS = dict(vocabulary=dict(vocab_size=32_000, hidden_size=128, intermediate_size=352, num_hidden_layers=3), layers=dict(vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=6))
PROTOCOLS = [((1024,), None), ((1024,), 256), ((256, 512, 1024), None), ((256, 512, 1024), 128)]    # lengths, stride; None is half of each length

def reader(kind, longest=1024):
    "A small Llama to be measured: most of its work in the output matrix (`vocabulary`) or in its layers (`layers`)."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**READERS[kind], num_attention_heads=4, max_position_embeddings=longest, bos_token_id=0)).to('cuda' if CUDA else 'cpu').eval()


def reading_documents(kind, tokens, n=1): return [np.random.default_rng(i).integers(2, READERS[kind]['vocab_size'], tokens) for i in range(n)]


def flops_ratio(kind, documents, lengths, stride):
    "Work of the released loop over the work of `perplexity`, counted: what one could gain at most if all work took the same time."
    from pose_nb.perplexity import reading_flops, readings, windows
    c = READERS[kind]; width = c['hidden_size']
    size = dict(inner=c['num_hidden_layers'] * (4 * width**2 + 3 * width * c['intermediate_size']), layers=c['num_hidden_layers'], width=width, vocab=c['vocab_size'])
    plans = [[(i, *w) for i, d in enumerate(documents) for w in windows(len(d), n - 1, stride or n // 2)] for n in lengths]
    return reading_flops(readings(plans, share=False), all_rows=True, **size) / reading_flops(readings(plans), **size)


def bench_perplexity(repeats):
    "The released way of measuring perplexity against `perplexity`: time in one run, and the counted work that bounds it."
    from pose_nb.perplexity import perplexity
    rows = []
    for kind in READERS:
        model, documents = reader(kind), reading_documents(kind, 2048, 2)
        for lengths, stride in PROTOCOLS:
            seen = {}
            def official(): seen['official'] = [official_perplexity(model, documents, n, stride or n // 2) for n in lengths]
            def ours(): seen['ours'] = list(perplexity(model, documents, lengths, stride, progress=False).ppl.values())
            t = interleaved(dict(official=official, ours=ours), repeats, warm=1)
            rows.append(dict(work_in=kind, lengths=lengths, stride=stride or 'half', speed=paired_ratio(t['official'], t['ours']), counted=flops_ratio(kind, documents, lengths, stride),
                             difference=max(abs(a / b - 1) for a, b in zip(seen['official'], seen['ours']))))
    peak = {k: peak_of('perplexity', k) for k in ('official', 'ours')}
    return dict(time=rows, memory=dict(tokens=16_384, vocabulary=32_000, **{f'{k}_mib': v for k, v in peak.items()}, ratio=peak['ours'] / peak['official']))


def peak_perplexity(kind, tokens=16_384):
    "Peak memory of one window of 16,384 tokens at a vocabulary of 32,000: `model(ids, labels=ids)` or `perplexity`."
    from pose_nb.perplexity import perplexity
    READERS['tiny'] = dict(vocab_size=32_000, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model, (document,) = reader('tiny', tokens), reading_documents('tiny', tokens - 1)
    ids = torch.tensor(np.r_[0, document], device=model.device)[None]
    def official():
        with torch.no_grad(): model(ids, labels=ids)
    return peak_above(official if kind == 'official' else lambda: perplexity(model, [document], tokens, progress=False), 1)


def official_replies(model, tokenizer, prompts, new_tokens=10):
    "The released passkey loop: one prompt at a time, no cache, all logits, everything read again for each token."
    out = []
    for p in prompts:
        x = torch.tensor([p.ids])
        with torch.inference_mode():
            for _ in range(new_tokens): x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        out.append(tokenizer.decode(x[0, len(p.ids):], skip_special_tokens=True))
    return out


def wide_model():
    "A random model that is wide enough for its matrix products to outweigh attention at 1,024 tokens, as in large models."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=1024, initializer_range=.1)).eval()


def bench_passkey(repeats, trials=20):
    "Passkey retrieval: the released loop and ours on the same prompts, with the replies compared. The work that is saved bounds the speed."
    from pose_nb.answers import answer, make_trials
    from pose_nb.model import default_base, load_model, load_tokenizer
    from pose_nb.retrieval import Passkey
    base, tok, task, rows = load_model(default_base(), device='cpu'), load_tokenizer(default_base()), Passkey(), []
    for name, model, length, depths in (('embedded base', base, 512, None), ('embedded base', base, 2048, None), ('embedded base', base, 2048, (0, .25, .5, .75, 1)), ('random, width 512', wide_model(), 1024, None)):
        prompts = [t['prompt'] for t in make_trials(task, tok, (length,), depths, trials // len(depths or [0]), bos=tok.bos_token_id)]
        replies, seen = {}, []
        def ours(): replies['ours'] = [a['reply'] for a in answer(model, tok, task, prompts)]
        def official(): replies['official'] = official_replies(model, tok, prompts)
        times = interleaved(dict(official=official, ours=ours), repeats, warm=0)
        same = sum(a.startswith(b) for a, b in zip(replies['official'], replies['ours']))          # ours stops when the answer is complete
        hook = model.register_forward_pre_hook(lambda m, a, kw: seen.append(a[0].numel()), with_kwargs=True); ours(); hook.remove()
        slow = sum(len(p.ids) + k for p in prompts for k in range(task.new_tokens))
        rows.append(dict(model=name, length=length, depths='drawn' if depths is None else len(depths), prompts=len(prompts), speedup=paired_ratio(times['official'], times['ours']), fewer_tokens=slow / sum(seen), same_replies=same))
    return rows


def reader_and_writer(kind, length):
    "Functions that read all but the last of so many tokens, and that write one behind them, with a relative map in the embedded model or with its own attention."
    from pose_nb.model import default_base, load_model
    from pose_nb.relative import DPE, get_relative, set_relative
    model, x, held = load_model(default_base(), device='cpu'), torch.from_numpy(np.random.default_rng(0).integers(5, 1000, length))[None], {}
    rel = None if kind == 'none' else DPE((1, 4, 16, 32), 128, 16) if kind == 'dpe' else get_relative(kind, 256, 8192)
    set_relative(model, rel)
    def read():
        with torch.inference_mode(): held['cache'] = model(x[:, :-1], logits_to_keep=1).past_key_values
    def write():
        with torch.inference_mode(): model(x[:, -1:], past_key_values=held['cache'], position_ids=torch.tensor([[length - 1]]), attention_mask=torch.ones(1, length, dtype=torch.int64))
        held['cache'].crop(-1)
    return read, write


def bench_relative(repeats):
    "Relative maps against plain attention: time of reading a text and of writing a token behind it, and peak memory of reading (all tensors)."
    kinds, rows = ('none', 'self_extend', 'rerope', 'leaky_rerope', 'dca', 'lm_infinite', 'dpe'), []
    for length in (2048, 8192):
        made = {k: reader_and_writer(k, length) for k in kinds}
        read, write = interleaved({k: f[0] for k, f in made.items()}, repeats), interleaved({k: f[1] for k, f in made.items()}, 5 * repeats)
        peak = {k: peak_of_tensors(f[0]) / 2**20 for k, f in made.items()}
        rows += [dict(map=k, length=length, reading=paired_ratio(read[k], read['none']), writing=paired_ratio(write[k], write['none']), memory=peak[k] / peak['none'], memory_mib=peak[k]) for k in kinds[1:]]
    return rows


def peak_of_words(what, kind):
    if what.startswith('loss'): return peak_loss(kind, vocab=int(what.split('-')[1]))
    if what == 'loop': globals()['VOCAB'] = 32_000; data = small_data(); LOOPS[kind](data, 1); return peak_above(lambda: LOOPS[kind](data, 4), 1)
    if what == 'perplexity': return peak_perplexity(kind)
    return peak_step(what, kind)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='few repeats: does it run?')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--only', help='parts, separated by commas: steps, overhead, loops, draw, loss, passkey, perplexity, relative')
    p.add_argument('--out', help='write the results as JSON')
    p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if not a.peak and not MALLOC.keys() <= os.environ.keys(): os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    if a.peak: return print(peak_of_words(*a.peak))
    from pose_nb.common import environment
    k = 3 if a.quick else 1
    parts = dict(steps=lambda: bench_steps(9 // k), overhead=lambda: bench_overhead(150 // k**3), loops=lambda: bench_loops(10 // k), draw=lambda: bench_draw(40 // k), loss=bench_loss,
                 passkey=lambda: bench_passkey(3 // k), perplexity=lambda: bench_perplexity(6 // k), relative=lambda: bench_relative(9 // k))
    results = {n: f() for n, f in parts.items() if not a.only or n in a.only.split(',')} | dict(environment=environment())
    text = json.dumps(results, indent=2)
    if a.out: Path(a.out).write_text(text + '\n')
    print(text)


if __name__ == '__main__': main()
