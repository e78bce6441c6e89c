"""Runs that are killed again and again, and must end with the same bits as a run that nobody killed.

    python tests/soak.py [--kills 200] [--seed 0] [--only plain,ddp] [--out tests/soak.txt]

A life is one process (or several, under `accelerate launch`) from its start to its death by SIGKILL. Its moment is drawn from the seed:
  time    uniform over the expected duration, from the start of the process to its end
  save    a moment after a hidden folder `.checkpoint-*` has appeared
  file    at an operation on a file of the output folder, drawn among all of them (forked lives only)
  step    a moment after the first new line of the log (after a checkpoint was damaged, so that the message can be seen)
  last    uniform over the time between the last step and the end
Most lives are forked from this process, which has imported everything; every sixth is the real `pose_nb` command, and those of several
processes are always real. After each death: every checkpoint is whole, the log agrees with the uninterrupted run, and a model that is there
is the right one. Once per run the newest checkpoint is damaged, and the next life must go on from the one before, with a message.
"""
import argparse, json, os, random, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path

from conftest import TARGET, command, extend_args, make_model, make_texts, make_tokenizer
ROOT = Path(__file__).parents[1]
os.environ |= dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore', DS_ACCELERATOR='cpu')
sys.path.insert(0, str(ROOT))
import psutil, torch, tqdm
tqdm.tqdm.set_lock(threading.RLock())      # its own lock is shared between forked processes, and one that is killed while it holds it would stop all later ones
torch.set_num_threads(1)
import peft, transformers.models.llama.modeling_llama, pose_nb.cli, pose_nb.workflow      # so that a forked life starts at once
from pose_nb.checkpoint import checkpoints, verify_checkpoint
from pose_nb.common import PoseError, environment, read_json
from pose_nb.train import read_log
from safetensors.torch import load_file

STEPS, LIMIT = 40, 240      # steps of a run; seconds after which a life counts as one that hangs
CONFIGS = {      # words of `extend`, share of the kills, processes that a life may have
    'plain':   (dict(save_steps=1), 34, (1,)),
    'workers': (dict(save_steps=2, dataloader_num_workers=2, gradient_accumulation_steps=2, per_device_train_batch_size=1), 34, (1,)),
    'lora':    (dict(save_steps=1, lora_r=4), 32, (1,)),
    'even':    (dict(save_steps=2, sampler='pose_even'), 32, (1,)),
    'best':    (dict(save_steps=1, eval_steps=3, load_best_model_at_end=True, eval_windows=2, eval_prompts=2), 44, (1,)),
    'ddp':     (dict(save_steps=1), 16, (2,)),
    'worlds':  (dict(save_steps=1), 8, (2, 1)),      # another number of processes in every life: the same examples, sums in another order
}


def make_files(d):
    "Tiny checkpoints with and without dropout, a corpus of short documents, and documents for the exam."
    for name, p in dict(base=.1, still=0.).items(): make_model(attention_dropout=p).save_pretrained(d/name); make_tokenizer().save_pretrained(d/name)
    for name, texts in dict(corpus=make_texts(40, 80), exam=make_texts(4, 240, seed=1)).items():
        (d/f'{name}.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts))


class Life:
    "One start of the program, ended by itself or by `kill`."
    def __init__(self, words, messages, processes=0, strike=0):      # processes 0: forked; 1: the real command; more: under accelerate launch
        self.t0, self.code, self.messages, self.processes = time.time(), None, messages, processes
        if processes: self.pid = (job := _command(words, messages, processes)).pid; self.job = job
        else: self.job, self.pid = None, _fork(words, messages, strike)
    def done(self):
        if self.code is not None: return True
        if self.job: self.code = self.job.poll()
        else:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None
    def tree(self):
        try: top = psutil.Process(self.pid); return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess: return []
    def kill(self, one=None):
        "SIGKILL to all processes, or to one rank, whose launcher then ends the others."
        everyone = self.tree()
        ranks = sorted((p for p in everyone[1:] if p.ppid() == self.pid), key=lambda p: p.pid)
        if one is not None and self.processes > 1 and len(ranks) > one:
            ranks[one].kill(); t = time.time()
            while not self.done() and time.time() - t < 60: time.sleep(.02)
        for p in {*everyone, *self.tree()}:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        while not self.done(): time.sleep(.002)
        psutil.wait_procs(everyone, timeout=20)


def _command(words, messages, processes):
    line = command(*words)
    if processes > 1:
        with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
        line = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'configs'/'accelerate'/'ddp.yaml', '--num_processes', processes, '--main_process_port', port, '-m', 'pose_nb.cli', *words]
    with open(messages, 'w') as f: return subprocess.Popen([str(w) for w in line], cwd=ROOT, stdout=f, stderr=f, start_new_session=True)


def _fork(words, messages, strike):
    "The command in a copy of this process; `strike`: die at that operation on a file of the output folder, 0 only counts them."
    pid = os.fork()
    if pid: return pid
    code = 99
    try:
        os.setsid()
        f = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(f, 1); os.dup2(f, 2)
        count = _die_at(strike, str(words[words.index('--output-dir') + 1]))
        code = pose_nb.cli.main([str(w) for w in words])
        Path(f'{messages}.files').write_text(str(count[0]))
    except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr)
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 99)


def _die_at(strike, out):
    count, mine = [0], os.getpid()
    def hook(event, args):
        if event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.rmtree') or os.getpid() != mine: return
        if not (str(args[0]).startswith(out) or event in ('os.remove', 'os.rmdir') and args[1] != -1): return
        count[0] += 1
        if count[0] == strike: os.kill(mine, signal.SIGKILL)
    sys.addaudithook(hook)
    return count


def words(d, config, out, processes=1):
    kw = dict(data=d/'corpus.jsonl', max_steps=STEPS, warmup_steps=5, save_total_limit=2, no_progress=True, per_device_train_batch_size=2) | CONFIGS[config][0]
    if config == 'best': kw['eval_data'] = d/'exam.jsonl'
    if processes > 1: kw['per_device_train_batch_size'] = 1
    args = extend_args(d/('still' if config == 'worlds' else 'base'), kw.pop('data'), out, **kw)
    return [str(a) for a in args]


def wait(life, until=lambda: False, seconds=LIMIT, nap=.001):
    "Until the life is over (True), or something has happened, or the time is up."
    while not life.done():
        if time.time() - life.t0 > seconds or until(): return False
        time.sleep(nap)
    return True


def uninterrupted(d, config):
    "The folder of the run that nobody kills, and what a life takes by its kind: seconds until the first step, of the steps, and of the end; operations on files."
    kinds, took, first = CONFIGS[config][2], {}, None
    for p in ({*kinds} if kinds != (1,) else {0, 1}):
        out = d/f'{config}-whole-{p}'
        life = Life(words(d, config, out, p or 1), d/'messages', p)
        wait(life, lambda: read_log(out))
        start = time.time() - life.t0
        wait(life, lambda: len(read_log(out)) == STEPS)
        steps = time.time() - life.t0 - start
        if not wait(life) or life.code: life.kill(); raise SystemExit(f'{config}, before anyone is killed: {life.messages.read_text()}')
        took[p] = start, steps, time.time() - life.t0 - start - steps, int(Path(f'{life.messages}.files').read_text()) if not p else 0
        first = first or out
        problems = compare(out, first, config)
        assert not problems, f'{config}: a forked life and a real one differ before anyone is killed: {problems}'
    return first, took


def same_weights(a, b, close):
    if not close: return a.read_bytes() == b.read_bytes()
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=2e-5) for n in a)


CLOCK = ('tokens_per_second', 'seconds', 'data_seconds', 'peak_gib')

def wrong_rows(rows, whole, close):
    "Steps whose line in the log, but for times and memory, differs from the uninterrupted run's."
    if [r['step'] for r in rows] != list(range(1, len(rows) + 1)): return ['order']
    if close: return [a['step'] for a, b in zip(rows, whole) if abs(a['loss'] - b['loss']) > 1e-5 or a['tokens'] != b['tokens'] or a['unseen'] != b['unseen']]
    clean = lambda r: {k: v for k, v in r.items() if k not in CLOCK}
    return [a['step'] for a, b in zip(rows, whole) if clean(a) != clean(b)]


def compare(out, whole, config):
    "What differs between two finished runs, [] for nothing."
    close, rows = config == 'worlds', read_log(out)
    bad = [f'step {s} of the log differs' for s in wrong_rows(rows, read_log(whole), close)[:3]] + [f'{len(rows)} steps in the log'] * (len(rows) != STEPS)
    if not same_weights(out/'model.safetensors', whole/'model.safetensors', close): bad.append('the final weights differ')
    for n in ('config.json', 'tokenizer.json', 'best.json')[:3 if config == 'best' else 2]:
        if (out/n).read_bytes() != (whole/n).read_bytes(): bad.append(f'{n} differs')
    if read_json(out/'pose_nb.json')['status'] != 'done': bad.append('the record does not say done')
    return bad + [f'{p.name} is left' for p in out.glob('.*')]


def examine(out, whole, config, hurt):
    "What is wrong with a folder after a kill, [] for nothing. `hurt`: the inode of a checkpoint that was damaged on purpose."
    bad, close = [], config == 'worlds'
    for p in checkpoints(out):
        try: verify_checkpoint(p)
        except PoseError as e: bad += [str(e)] * (p.stat().st_ino != hurt)
    bad += [f'step {s} of the log differs' for s in wrong_rows(read_log(out), read_log(whole), close)[:3]]
    for n in ('pose_nb.json', 'best.json'):
        try: read_json(out/n) if (out/n).exists() else None
        except PoseError as e: bad.append(str(e))
    if (out/'config.json').exists() and not same_weights(out/'model.safetensors', whole/'model.safetensors', close): bad.append('a model is there, and it is not the right one')
    return bad


def where(out, start, t0):
    "In which part of its life a process was killed, from what it left."
    log = out/'train_log.jsonl'
    if not log.exists() or log.stat().st_mtime < t0: return 'before the first step'
    names, steps = {p.name for p in out.iterdir()}, len(read_log(out))
    if any(n.startswith('.checkpoint-') and n.endswith('.tmp') for n in names): return 'inside a save'
    if any(n.startswith('.checkpoint-') for n in names): return 'deleting an old checkpoint'
    if '.best.tmp' in names or ('best' in names) != ('best.json' in names): return 'keeping the best weights'
    if steps == STEPS: return 'at the end'
    return 'before the first step' if steps <= start else 'between steps'


def damage(checkpoint, rng):
    "Cut a file off or flip one of its bits. -> what was done, the folder's inode"
    f = rng.choice(sorted(p for p in checkpoint.rglob('*') if p.is_file() and p.stat().st_size))
    raw = bytearray(f.read_bytes())
    at, cut = rng.randrange(len(raw)), f.name == 'manifest.json' or rng.random() < .5
    if cut: raw = raw[:at]
    else: raw[at] ^= 1 << rng.randrange(8)
    f.write_bytes(raw)
    return f"{f.relative_to(checkpoint)} of {checkpoint.name} {'cut off' if cut else 'changed in a bit'}", checkpoint.stat().st_ino


def moment(kind, life, out, start, took, rng):
    "Wait for the moment of death. -> False if the life ended before"
    begin, steps, end, _ = took
    if kind == 'file': return not wait(life) or life.code == -signal.SIGKILL
    if kind == 'time': return not wait(life, seconds=rng.uniform(0, begin + steps * (STEPS - start) / STEPS + end))
    mark, later = time.time_ns(), rng.uniform(0, end if kind == 'last' else .08)
    log = out/'train_log.jsonl'
    def stepped(n=1): return log.exists() and log.stat().st_mtime_ns > mark and len(read_log(out)) >= start + n
    if wait(life, lambda: stepped(STEPS - start if kind == 'last' else 1)): return False
    if kind == 'save':
        n = rng.randrange(1, max(2, min(STEPS - start - 2, 12)))
        if wait(life, lambda: stepped(n) and any(p.startswith('.checkpoint-') for p in os.listdir(out)), nap=.0003): return False
    return not wait(life, seconds=time.time() - life.t0 + later)


class Soak:
    "The counts of all runs."
    def __init__(self, d): self.d, self.rng, self.lives, self.total, self.lines, self.forks = d, None, 0, Counter(), [], 0
    def say(self, line): print(line, flush=True); self.lines.append(line)
    def life(self, config, out, processes, resume, strike):
        args = words(self.d, config, out, processes or 1) + ['--resume-from-checkpoint'] * resume
        self.lives += 1
        return Life(args, self.d/'messages', processes, strike)

    def run(self, config, number, most, whole, took):
        "One run, killed up to `most` times, then left to end. -> kills"
        rng, out, kills, n = self.rng, self.d/f'{config}-{number}', 0, Counter()
        hurt, told, to_damage, problems = None, None, rng.randrange(1, 5), []
        while not problems:
            found = checkpoints(out) if out.exists() else []
            if out.exists() and not found: shutil.rmtree(out)
            n['started afresh'] += kills > 0 and not found
            if kills < most and kills >= to_damage and len(found) == 2:
                what, hurt = damage(found[-1], rng); told, to_damage, found = f'going on from {found[0].name}.', 1e9, found[:1]
            start = int(found[-1].name.split('-')[1]) if found else 0
            if rng.random() < .25: shutil.rmtree(self.d/'tokens', ignore_errors=True)
            processes = self.kind(config)
            kind = 'end' if kills >= most else 'step' if told else 'last' if kills == most - 1 and rng.random() < .5 else rng.choice(['time', 'time', 'save'] + ['file'] * (not processes))
            strike = rng.randrange(1, max(2, int(took[processes][3] * (STEPS - start) / STEPS))) if kind == 'file' else 0
            life = self.life(config, out, processes, bool(found), strike)
            n['resumes'] += bool(found)
            killed = moment(kind, life, out, start, took[processes], rng) if kind != 'end' else not wait(life)
            if time.time() - life.t0 > LIMIT: problems.append(f'a life hangs after step {len(read_log(out))}: {life.messages.read_text()[-1500:]}')
            if killed:
                one = rng.randrange(2) if processes > 1 and rng.random() < .25 else None
                life.kill(one)
                kills += 1
                n['kills'] += 1; n[f'by {kind}'] += 1; n['one rank only'] += one is not None
                n['forked' if not processes else 'of the pose_nb command' if processes == 1 else 'under accelerate launch'] += 1
                n[where(out, start, life.t0)] += 1
            if told:
                if told in life.messages.read_text(): n['damaged checkpoints passed over'] += 1
                else: problems.append(f'{what}, and no message says "{told}"')
                told = None
            if out.exists() and hurt not in [p.stat().st_ino for p in checkpoints(out)]: hurt = None
            if killed: problems += examine(out, whole, config, hurt) if out.exists() else []
            elif life.code: problems.append(f'a life ended by itself with code {life.code}: {life.messages.read_text()[-1500:]}')
            else: problems += compare(out, whole, config); break
        self.total += n + Counter(dict(runs=1, mismatches=len(problems)))
        self.say(f"{config:8} run {number}: {n['kills']} kills ({'; '.join(f'{k} {n[k]}' for k in PLACES if n[k])}), {n['resumes']} resumes, {n['started afresh']} fresh starts, {n['damaged checkpoints passed over']} damaged: {'same bits' if not problems and config != 'worlds' else 'same examples' if not problems else 'MISMATCH'}")
        for p in problems: self.say(f'  {p}')
        if not problems: shutil.rmtree(out)
        return kills

    def kind(self, config):
        "How many processes the next life has; 0 for a forked one."
        kinds = CONFIGS[config][2]
        if kinds != (1,): return kinds[self.lives % len(kinds)]
        self.forks += 1
        return int(self.forks % 6 == 0)


PLACES = ('before the first step', 'between steps', 'inside a save', 'deleting an old checkpoint', 'keeping the best weights', 'at the end')


def main():
    p = argparse.ArgumentParser(description='Kill runs at random moments and compare them with runs that nobody kills.')
    p.add_argument('--kills', type=int, default=200, help='how many')
    p.add_argument('--seed', type=int, default=0, help='draws every moment')
    p.add_argument('--only', default=','.join(CONFIGS), help='configurations, separated by commas')
    p.add_argument('--out', help='write the result to this file')
    a = p.parse_args()
    d, names, t0 = Path(tempfile.mkdtemp(prefix='pose_nb_soak_')), a.only.split(','), time.time()
    os.environ |= dict(POSE_NB_CACHE=str(d/'tokens'), HF_DATASETS_CACHE=str(d/'datasets'), HF_MODULES_CACHE=str(d/'modules'), TMPDIR=str(d/'tmp'))
    (d/'tmp').mkdir(); tempfile.tempdir = None
    make_files(d)
    soak, shares = Soak(d), sum(CONFIGS[c][1] for c in names)
    for c in names:
        whole, took, soak.rng = *uninterrupted(d, c), random.Random(f'{a.seed} {c}')
        left, number = max(1, round(a.kills * CONFIGS[c][1] / shares)), 0
        while left > 0 and number < 3 * a.kills: left, number = left - soak.run(c, number, min(left, 8), whole, took), number + 1
    t, n = soak.total, soak.total.get
    soak.say(f"\n{n('runs')} runs, {t['kills']} kills: " + ', '.join(f'{t[k]} {k}' for k in PLACES))
    soak.say(f"kills by their moment: {t['by time']} at a random time, {t['by save']} aimed at a save, {t['by file']} at a random operation on a file, {t['by step']} soon after a step, {t['by last']} after the last step")
    soak.say(f"killed: {t['forked']} forked copies, {t['of the pose_nb command']} pose_nb commands, {t['under accelerate launch']} under accelerate launch, {t['one rank only']} of these by killing one rank only")
    soak.say(f"{t['resumes']} resumes, {t['started afresh']} fresh starts where no checkpoint was there yet, {t['damaged checkpoints passed over']} damaged checkpoints passed over, {t['mismatches']} mismatches")
    soak.say(f"seed {a.seed}, {STEPS} steps a run; {json.dumps(environment())}")
    print(f'{time.time() - t0:.0f} s' + (f', what went wrong is kept in {d}' if t['mismatches'] else ''))
    if a.out: Path(a.out).write_text(f"python tests/soak.py --kills {a.kills} --seed {a.seed}" + (f' --only {a.only}' if a.only != ','.join(CONFIGS) else '') + '\n\n' + '\n'.join(soak.lines) + '\n')
    if not t['mismatches']: shutil.rmtree(d, ignore_errors=True)
    return int(t['mismatches'] > 0)


if __name__ == '__main__': sys.exit(main())
