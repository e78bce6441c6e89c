"A corpus is tokenised once and exactly, sources keep their shares, and a stream gives the same example under the same number."
import bisect, gzip, json, multiprocessing, os, pickle, random, signal, socket, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from conftest import WORDS, make_model, make_texts, make_tokenizer
from hypothesis import given, settings as hypothesis_settings, strategies as st

from pose_nb import sources
from pose_nb.common import PoseError
from pose_nb.data import WindowDataset, read_documents, tokenize
from pose_nb.positions import PoSE, example_rng
from pose_nb.samplers import Turns
from pose_nb.sources import Sources, StreamDataset, content_key, open_sources, parse_sources, split_weight, token_store, tokenizer_key
from pose_nb.train import TrainSettings, _loader, step_indices, train

TOK = make_tokenizer()
SAMPLER = PoSE(64, 256)


def write(path, texts, **kw): path.write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts)); return path
def store(source, cache, tokenizer=TOK, **kw): return token_store(source, tokenizer, cache_dir=cache, progress=False, **kw)
def same(kept, source): want = tokenize(read_documents(source), TOK, progress=False); return np.array_equal(kept.tokens, want.tokens) and np.array_equal(kept.offsets, want.offsets)
def whole(cache): return sorted(p.name for p in cache.iterdir() if not p.name.startswith('.'))
def hidden(cache): return [p for p in cache.iterdir() if p.name.startswith('.') and p.is_dir()]


@pytest.fixture
def calls(monkeypatch):
    "The batches that were tokenised in this process."
    seen, encode = [], sources._encode
    monkeypatch.setattr(sources, '_encode', lambda texts, tokenizer: (seen.append(len(texts)), encode(texts, tokenizer))[1])
    return seen


# ---- token stores

@pytest.mark.parametrize('num_proc,batch', [(1, 1), (1, 64), (2, 7), (3, 16), (9, 3)])
def test_any_number_of_processes_and_any_batch_give_the_tokens_of_the_simple_function(corpus, tmp_path, num_proc, batch):
    kept = store(corpus.jsonl, tmp_path, num_proc=num_proc, batch=batch)
    assert same(kept, corpus.jsonl) and kept.tokens.dtype == np.int32 and kept.offsets.dtype == np.int64


@pytest.mark.parametrize('kind', ['txt', 'gz', 'parquet', 'folder', 'list'])
def test_every_kind_of_source_is_tokenised_as_it_is_read(corpus, tmp_path, kind):
    source = [corpus.jsonl, corpus.folder, corpus.txt] if kind == 'list' else getattr(corpus, kind)
    kept = store(source, tmp_path, num_proc=2)
    assert same(kept, source)
    texts = list(read_documents(source))
    assert kept.report == dict(documents=len(texts), tokens=len(kept.tokens), characters=sum(map(len, texts)), cached=False, shortest=kept.lengths.min(), longest=kept.lengths.max(),
                               **{k: round(float(np.quantile(kept.lengths, q))) for k, q in dict(p10=.1, median=.5, p90=.9).items()})


def test_documents_without_tokens_keep_their_place(tmp_path):
    class Silent(type(TOK)):
        def __call__(self, texts, **kw): return dict(input_ids=[[] if 'quiet' in t else [1, 2, 3] for t in texts])
    tok = Silent(tokenizer_object=TOK.backend_tokenizer)
    kept = store(write(tmp_path/'a.jsonl', ['one', 'quiet', 'two', 'quiet']), tmp_path/'c', tok)
    assert kept.lengths.tolist() == [3, 0, 3, 0] and kept.tokens.tolist() == [1, 2, 3] * 2


def test_the_same_content_is_tokenised_once_and_other_content_again(corpus, tmp_path, calls):
    first = store(corpus.jsonl, tmp_path/'c')
    n = len(calls); assert n and not first.report['cached']
    copy = tmp_path/'copy.jsonl'; copy.write_bytes(corpus.jsonl.read_bytes())
    again = [store(s, tmp_path/'c', t) for s, t in ((corpus.jsonl, TOK), (copy, TOK), (corpus.jsonl, make_tokenizer()))]
    assert len(calls) == n and all(a.report == first.report | dict(cached=True) and a.path == first.path for a in again)
    copy.write_bytes(copy.read_bytes().replace(b'river', b'rivet', 1))
    assert not store(copy, tmp_path/'c').report['cached'] and len(calls) == 2 * n
    assert not store(corpus.jsonl, tmp_path/'c', make_tokenizer(bos=False)).report['cached'] and len(whole(tmp_path/'c')) == 3


def test_a_file_that_changes_without_a_new_time_or_size_is_read_again(tmp_path):
    p = write(tmp_path/'a.jsonl', ['the old words'] * 3); os.utime(p, (1, 1))
    old = store(p, tmp_path/'c')
    write(p, ['the new words'] * 3); os.utime(p, (1, 1))
    new = store(p, tmp_path/'c')
    assert new.path != old.path and not np.array_equal(old.tokens, new.tokens) and same(new, p)


def test_names_do_not_enter_the_key_but_order_format_and_field_do(corpus, tmp_path):
    for i in range(2):
        (tmp_path/f'f{i}').mkdir()
        for k, t in enumerate(corpus.texts[:2]): (tmp_path/f'f{i}'/('ab'[k] if i == 0 else 'xy'[k])).write_text(t)
    key = content_key(tmp_path/'f0', TOK)
    assert content_key(tmp_path/'f1', TOK) == key == content_key([tmp_path/'f0'/'a', tmp_path/'f0'/'b'], TOK)
    (tmp_path/'same.jsonl').write_bytes((tmp_path/'f0'/'a').read_bytes())
    others = [content_key([tmp_path/'f0'/'b', tmp_path/'f0'/'a'], TOK), content_key(tmp_path/'f0', TOK, text_field='body'), content_key(tmp_path/'f0'/'a', TOK), content_key(tmp_path/'same.jsonl', TOK), content_key('stdlib', TOK)]
    assert len({key, *others}) == 6


def test_a_tokenizer_is_known_by_what_it_does(tmp_path):
    from transformers import AutoTokenizer, ByT5Tokenizer
    TOK.save_pretrained(tmp_path/'t')
    again, more = (AutoTokenizer.from_pretrained(tmp_path/'t') for _ in range(2))
    again(['a long text'] * 2, truncation=True, max_length=2, padding='max_length') if again.pad_token else again(['a long text'], truncation=True, max_length=2)
    more.add_tokens(['river light'])
    assert tokenizer_key(again) == tokenizer_key(TOK) != tokenizer_key(more)
    assert tokenizer_key(ByT5Tokenizer()) == tokenizer_key(ByT5Tokenizer()) != tokenizer_key(ByT5Tokenizer(extra_ids=7))


def test_a_tokenizer_written_in_python_works_in_processes_too(corpus, tmp_path):
    from transformers import ByT5Tokenizer
    a, b = store(corpus.folder, tmp_path/'a', ByT5Tokenizer(), num_proc=2), tokenize(read_documents(corpus.folder), ByT5Tokenizer(), progress=False)
    assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.offsets, b.offsets)


def forked(f, *args):
    "Run `f` in a process of its own -> the process and a pipe that its result comes through."
    here, there = multiprocessing.Pipe(duplex=False)
    def run(): there.send(f(*args))
    job = multiprocessing.get_context('fork').Process(target=run); job.start(); there.close()
    return job, here

def dies_in(name, after, source, cache):
    "Tokenise, but be killed at call `after` of a function."
    owner = os if name == 'replace' else sources
    f, n = getattr(owner, name), [0]
    def g(*a, **kw):
        n[0] += 1
        return os.kill(os.getpid(), signal.SIGKILL) if n[0] > after else f(*a, **kw)
    setattr(owner, name, g)
    store(source, cache, batch=4)

@pytest.mark.parametrize('where,after', [('_encode', 3), ('write_json', 0), ('replace', 0)])
def test_a_killed_run_leaves_nothing_that_looks_whole(corpus, tmp_path, where, after):
    job, _ = forked(dies_in, where, after, corpus.jsonl, tmp_path); job.join(60)
    assert job.exitcode == -9 and not whole(tmp_path) and len(hidden(tmp_path)) == 1
    kept = store(corpus.jsonl, tmp_path)
    assert not kept.report['cached'] and same(kept, corpus.jsonl) and whole(tmp_path) == [kept.path.name] and not hidden(tmp_path)


DAMAGE = dict(
    token_changed=lambda d: (d/'tokens.npy').write_bytes((d/'tokens.npy').read_bytes()[:-4] + b'\1\0\0\0'),
    tokens_cut=lambda d: (d/'tokens.npy').write_bytes((d/'tokens.npy').read_bytes()[:-40]),
    offset_changed=lambda d: np.save(d/'offsets.npy', np.concatenate([[0, 1], np.load(d/'offsets.npy')[2:]])),
    offsets_gone=lambda d: (d/'offsets.npy').unlink(),
    tokens_empty=lambda d: (d/'tokens.npy').write_bytes(b''),
    record_gone=lambda d: (d/'store.json').unlink(),
    record_cut=lambda d: (d/'store.json').write_text('{"tokens"'),
    record_bare=lambda d: (d/'store.json').write_text(json.dumps(dict(documents=1, tokens=json.loads((d/'store.json').read_text())['tokens']))),
)

@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_store_is_made_again(corpus, tmp_path, name):
    kept = store(corpus.jsonl, tmp_path)
    path = kept.path; del kept
    DAMAGE[name](path)
    again = store(corpus.jsonl, tmp_path)
    assert not again.report['cached'] and same(again, corpus.jsonl) and not hidden(tmp_path) and whole(tmp_path) == [path.name]
    assert store(corpus.jsonl, tmp_path).report['cached']


def at_once(source, cache): kept = store(source, cache, batch=2); return kept.report['cached'], same(kept, source)

def test_processes_that_start_together_share_one_store(corpus, tmp_path):
    jobs = [forked(at_once, corpus.jsonl, tmp_path) for _ in range(3)]
    said = [there.recv() for _, there in jobs]
    for job, _ in jobs: job.join(60)
    assert sorted(said) == [(False, True), (True, True), (True, True)] and len(whole(tmp_path)) == 1 and not hidden(tmp_path)


class Bytes(type(TOK)):
    "A token per byte: quick, and four bytes of tokens for each byte of text."
    def __call__(self, texts, **kw): return dict(input_ids=[np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts])

def grows(how, source, small, cache):
    "Memory that only this process holds: its peak growth while it tokenises, over the bytes of text and tokens."
    def anonymous(): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
    def watch():
        while not done.is_set(): seen.append(anonymous()); time.sleep(.003)
    tok, seen, done = Bytes(tokenizer_object=TOK.backend_tokenizer), [], threading.Event()
    f = (lambda s: store(s, cache, tok, batch=16)) if how == 'store' else (lambda s: tokenize(read_documents(s), tok, progress=False))
    f(small)                              # libraries are loaded and their pools filled
    base, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start(); r = f(source); done.set(); watcher.join()
    return (max(seen) - base) / (Path(source).stat().st_size + 4 * len(r.tokens)), len(r.tokens)

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_stays_far_below_the_corpus(tmp_path):
    texts = make_texts(20, 1500)
    big, small = write(tmp_path/'big.jsonl', texts * 400), write(tmp_path/'small.jsonl', texts * 150)
    measured = {}
    for how in ('store', 'simple'):
        job, there = forked(grows, how, big, small, tmp_path/'c'); measured[how] = there.recv(); job.join(60)
    (kept, n), (simple, m) = measured['store'], measured['simple']
    print(f'peak growth over bytes of text and tokens: token_store {kept:.2f}, tokenize {simple:.2f}; {n:,} tokens')
    assert n == m and kept < .15 and simple > .8


def words():
    "A tokenizer that is fast to run: one token per word."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.WordLevel({'?': 0} | {w: i + 1 for i, w in enumerate(WORDS)}, unk_token='?'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok)


BAD = dict(
    missing=('no_such_file.jsonl', None), empty=('x.txt', b''), blank=('x.txt', b' \n'), binary=('x.bin', b'a\0b'), latin=('x.txt', 'schön'.encode('latin1')), latin_jsonl=('x.jsonl', '{"text": "schön"}\n'.encode('latin1')),
    broken=('x.jsonl', b'{"text": "a"}\n{{{\n'), field=('x.jsonl', b'{"body": "a"}\n'), number=('x.jsonl', b'{"text": 5}\n'), cut_gzip=('x.jsonl.gz', gzip.compress(os.urandom(9000))[:500]), parquet=('x.parquet', b'hello'),
)

@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('how', ['store', 'stream'])
def test_bad_input_gets_the_sentence_of_the_reader(tmp_path, name, how):
    file, data = BAD[name]
    if data is not None: (tmp_path/file).write_bytes(data)
    with pytest.raises(PoseError) as said: list(read_documents(tmp_path/file))
    with pytest.raises(PoseError) as got: store(tmp_path/file, tmp_path/'c') if how == 'store' else StreamDataset(tmp_path/file, TOK, SAMPLER)
    assert str(got.value) == str(said.value)
    assert how == 'stream' or not (tmp_path/'c').exists() or not whole(tmp_path/'c') and not hidden(tmp_path/'c')


def test_a_field_that_is_missing_only_later_is_named(tmp_path):
    p = tmp_path/'x.jsonl'
    p.write_text(''.join(json.dumps(dict(text='word ' * 2000)) + '\n' for _ in range(1200)) + ''.join(json.dumps(dict(body='word ' * 2000)) + '\n' for _ in range(1200)))
    with pytest.raises(PoseError, match="x.jsonl"): list(read_documents(p))


@pytest.mark.parametrize('where', ['np.save', 'os.replace', 'Dataset.map'])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(corpus, tmp_path, monkeypatch, where):
    import datasets
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(*{'np.save': (np, 'save'), 'os.replace': (sources.os, 'replace'), 'Dataset.map': (datasets.Dataset, 'map')}[where], full)
    with pytest.raises(PoseError, match='cannot write'): store(corpus.jsonl, tmp_path)
    assert not whole(tmp_path) and not hidden(tmp_path)


@pytest.mark.parametrize('kw,says', [(dict(num_proc=0), 'num_proc is 0'), (dict(batch=0), 'batch is 0'), (dict(num_proc=1.5), 'num_proc is 1.5')])
def test_settings_that_cannot_work_are_refused(corpus, tmp_path, kw, says):
    with pytest.raises(PoseError, match=says): store(corpus.jsonl, tmp_path/'c', **kw)
    with pytest.raises(PoseError, match='cannot write tokens'): store(corpus.jsonl, corpus.txt)


def test_a_tokenizer_that_fails_says_so_and_leaves_nothing(corpus, tmp_path):
    class Broken(type(TOK)):
        def __call__(self, *a, **kw): raise RuntimeError('the tokenizer broke')
    with pytest.raises(RuntimeError, match='the tokenizer broke'): store(corpus.jsonl, tmp_path, Broken(tokenizer_object=TOK.backend_tokenizer))
    assert not whole(tmp_path) and not hidden(tmp_path)


def test_a_process_that_is_killed_while_it_tokenises_is_one_sentence(corpus, tmp_path):
    class Hungry(type(TOK)):
        def __call__(self, *a, **kw): os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PoseError, match='was killed, perhaps for want of memory'): store(corpus.jsonl, tmp_path, Hungry(tokenizer_object=TOK.backend_tokenizer), num_proc=2)
    assert not whole(tmp_path) and not hidden(tmp_path)


class Slow(type(TOK)):
    def __call__(self, *a, **kw): time.sleep(.3); return super().__call__(*a, **kw)

def test_processes_do_not_outlive_a_killed_program(corpus, tmp_path):
    import psutil
    def slowly(): store(corpus.jsonl, tmp_path, Slow(tokenizer_object=TOK.backend_tokenizer), num_proc=2, batch=1)
    def wait(until, seconds=30):
        end = time.time() + seconds
        while not until() and time.time() < end: time.sleep(.1)
        return until()
    job, _ = forked(slowly)
    children = lambda: psutil.Process(job.pid).children(recursive=True)
    assert wait(lambda: len(children()) >= 3); time.sleep(.5)
    left = children(); job.kill(); job.join()
    alive = lambda: [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    ok = wait(lambda: len(alive()) <= 1)                       # the queue server of `datasets` stays, asleep
    for p in alive(): p.kill()
    assert ok and not whole(tmp_path)
    assert not store(corpus.jsonl, tmp_path, num_proc=2).report['cached']


def test_the_default_folder_can_be_set(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv('POSE_NB_CACHE', str(tmp_path/'here'))
    assert token_store(corpus.folder, TOK, progress=False).path.parent == tmp_path/'here'
    monkeypatch.delenv('POSE_NB_CACHE')
    assert sources.cache_folder() == Path.home()/'.cache'/'pose_nb'/'tokens'


@pytest.fixture
def hub(monkeypatch):
    "Pretend that a dataset id exists; -> the list of how it was opened."
    import datasets
    real, opened = datasets.load_dataset, []
    table = datasets.Dataset.from_dict(dict(text=make_texts(30), other=list(range(30))))
    def load(name, *a, **kw):
        if name != 'owner/set': return real(name, *a, **kw)
        opened.append(kw.get('streaming'))
        return table.to_iterable_dataset() if kw.get('streaming') else table
    monkeypatch.setattr(datasets, 'load_dataset', load)
    return opened


def test_a_hub_dataset_is_kept_by_its_fingerprint_and_streamed_without_being_stored(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = store('owner/set', tmp_path/'c')
    assert len(kept) == 30 and store('owner/set', tmp_path/'c').report['cached'] and set(hub) == {False}
    hub.clear()
    stream = StreamDataset('owner/set', TOK, SAMPLER, bos=0)
    assert [stream.document(i) for i in range(61)] == [divmod(i, 30) for i in range(61)] and set(hub) == {True}
    with pytest.raises(PoseError, match="has no field 'body'; it has: text, other"): StreamDataset('owner/set', TOK, SAMPLER, text_field='body')


# ---- several sources

def test_a_weight_is_only_a_number_behind_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'real:3').write_text('x')
    for s, want in {'a.jsonl:0.7': ('a.jsonl', .7), 'a.jsonl': ('a.jsonl', None), 'owner/set:2': ('owner/set', 2.), 'real:3': ('real:3', None), 'real:3:5': ('real:3', 5.), 'C:\\data\\a.txt': ('C:\\data\\a.txt', None),
                    'C:/data:1e-2': ('C:/data', .01), 's3://bucket/a': ('s3://bucket/a', None), 'a:b': ('a:b', None), ':1': (':1', None), 'a:-1': ('a', -1.)}.items(): assert split_weight(s) == want, s
    assert parse_sources(['a:3', 'b:1']) == {'a': .75, 'b': .25} == parse_sources({'a': 6, 'b': np.float32(2)})
    assert parse_sources(Path('a')) == {'a': None} == parse_sources('a') == parse_sources({'a': None}) and parse_sources(['a', 'b']) == {'a': None, 'b': None} and parse_sources('a:9') == {'a': 1.}


@pytest.mark.parametrize('data,says', [('a:0', 'the weight of a is 0'), ('a:-2', 'the weight of a is -2'), ('a:nan', 'the weight of a is nan'), ('a:inf', 'the weight of a is inf'), ({'a': 'many'}, 'the weight of a is many'),
                                       (['a:1', 'b'], 'b has no weight'), (['a:1', 'a:2'], 'a is named twice'), (['./a', 'a'], None), ([], 'no source'), ({}, 'no source')])
def test_sources_that_cannot_be_meant_are_refused(tmp_path, monkeypatch, data, says):
    monkeypatch.chdir(tmp_path); (tmp_path/'a').write_text('x')
    with pytest.raises(PoseError, match=says or 'is named twice'): parse_sources(data)


class Numbers(torch.utils.data.Dataset):
    "A dataset of its own numbers."
    def __getitem__(self, i): return i


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(.001, 100), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.integers(0, 5000))
def test_each_source_has_its_share_and_is_read_in_its_own_order(weights, seed, start):
    s = Sources({str(k): (Numbers(), w) for k, w in enumerate(weights)}, seed)
    share = np.array(weights) / sum(weights)
    picks = [s.place(i) for i in range(3 * s.block)]
    for b in range(3): assert np.abs(np.bincount([w for w, _ in picks[b * s.block:(b + 1) * s.block]], minlength=len(weights)) - share * s.block).max() <= 1 + 1e-6
    for k in range(len(weights)): assert [n for w, n in picks if w == k] == list(range(sum(w == k for w, _ in picks)))
    assert Sources({str(k): (Numbers(), w) for k, w in enumerate(weights)}, seed).place(start) == s.place(start) and s[start] == s.place(start)[1]
    assert s.windows(start).tolist() == np.bincount([s.place(i)[0] for i in range(start)] or [0], minlength=len(weights)).tolist() if start else s.windows(0).sum() == 0


def test_shares_hold_in_the_long_run_and_the_order_is_mixed():
    s = Sources(dict(a=(Numbers(), .7), b=(Numbers(), .3)))
    picks = np.array([s.place(i)[0] for i in range(20_000)])
    assert abs(picks.mean() - .3) < 1e-3
    assert abs((picks[1:] & picks[:-1]).mean() - .09) < .01           # neighbours are as good as independent
    assert not np.array_equal(picks[:1024], picks[1024:2048])


def test_sources_without_weights_are_read_equally_often(corpus, tmp_path):
    two = open_sources([corpus.jsonl, corpus.folder], TOK, SAMPLER, bos=0, cache_dir=tmp_path, progress=False)
    rows = two.plan(10_000)
    assert rows[0]['epochs'] == pytest.approx(rows[1]['epochs'], rel=.02) and rows[0]['share'] > rows[1]['share'] and sum(r['windows'] for r in rows) == 10_000
    assert two.report['documents'] == 46 and two.report['sources'][str(corpus.folder)]['documents'] == 6
    one = open_sources(corpus.jsonl, TOK, SAMPLER, bos=0, cache_dir=tmp_path, progress=False)
    alone = WindowDataset(tokenize(read_documents(corpus.jsonl), TOK, progress=False), SAMPLER, bos=0)
    assert all(torch.equal(v, alone[i][k]) for i in (0, 7, 500) for k, v in one[i].items())


def test_a_source_that_cannot_be_used_is_named(corpus, short_corpus, tmp_path):
    both = [f'{corpus.jsonl}:1', f'{short_corpus}:1']
    with pytest.raises(PoseError, match='short.jsonl: no document is long enough'): open_sources(both, TOK, SAMPLER, cache_dir=tmp_path, progress=False)
    streams = open_sources(both, TOK, SAMPLER, stream=True)
    with pytest.raises(PoseError, match='short.jsonl has no document of at least'): [streams[i] for i in range(30)]
    with pytest.raises(PoseError, match='give every source a weight'): open_sources([corpus.jsonl, corpus.folder], TOK, SAMPLER, stream=True)


# ---- streams

SIZES = [int(n) for n in np.random.default_rng(4).choice([5, 20, 56, 58, 60, 62, 70, 90, 150], 60)]
def documents(sizes=SIZES): return [' '.join(random.Random(i).choice(WORDS) for _ in range(n)) for i, n in enumerate(sizes)]
def stream(sizes=SIZES, **kw): return StreamDataset(lambda: iter(documents(sizes)), words(), SAMPLER, **kw)


def reference(texts, tokenizer, need, min_bytes, index):
    "(pass, document) by the rule of the page, with everything in memory."
    candidates = [n for n, t in enumerate(texts) if len(t.encode()) >= min_bytes]
    good = [k for k, n in enumerate(candidates) if len(tokenizer(texts[n], add_special_tokens=False)['input_ids']) >= need]
    epoch, place = divmod(index, len(candidates))
    at = bisect.bisect_left(good, place)
    return epoch, candidates[good[at if at < len(good) else 0]]


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([5, 50, 60, 63, 64, 70, 120]), min_size=1, max_size=30), st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(1, 400))
def test_a_number_names_a_document_in_whatever_order_it_is_asked_for(sizes, asked, min_bytes):
    texts = documents(sizes + [64] + sizes[::-1])
    s = StreamDataset(lambda: iter(texts), words(), SAMPLER, min_bytes=min_bytes)
    if max(len(t) for t in texts) < min_bytes: return
    try: want = [reference(texts, words(), 64, min_bytes, i) for i in asked]
    except (IndexError, ZeroDivisionError): return                     # no candidate suits
    assert [s.document(i) for i in asked] == want


def test_a_window_is_what_a_store_would_give_for_that_document():
    s = stream(seed=5, bos=0)
    kept = WindowDataset(tokenize(documents(), words(), progress=False), SAMPLER, seed=5, bos=0)
    for i in (0, 3, 17, 200):
        epoch, n = s.document(i)
        want = kept._window(kept.store[n], example_rng(5, epoch, i % s.per_pass if s.per_pass else i), i)
        assert all(torch.equal(v, want[k]) for k, v in s[i].items())


class Rank:
    def __init__(self, process_index, num_processes): self.process_index, self.num_processes = process_index, num_processes

def read(make, world=1, workers=0, start=0, accumulate=1, steps=6):
    "{example number: tensors} as the training loop's loader reads them, and what each process did."
    s = TrainSettings(max_steps=steps, per_device_train_batch_size=8 // world // accumulate, gradient_accumulation_steps=accumulate, dataloader_num_workers=workers)
    seen, reports = {}, []
    for r in range(world):
        d = make(); d[0]                                                # as the guards do, before workers are forked
        batches = [step_indices(t, m, s, r, world) for t in range(start, steps) for m in range(accumulate)]
        for numbers, b in zip(batches, _loader(d, s, start, Rank(r, world)), strict=True):
            for k, i in enumerate(numbers): seen[i] = {n: v[k] for n, v in b.items()}
        reports.append(d.report)
    return seen, reports

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[i][n]) for i, e in a.items() for n, v in e.items())

@pytest.fixture(scope='module')
def alone(): return read(lambda: stream(seed=1))

@pytest.mark.parametrize('world,workers,accumulate', [(2, 0, 1), (4, 0, 1), (1, 2, 1), (2, 2, 2), (4, 2, 1), (1, 3, 4), (2, 0, 4)])
def test_processes_workers_and_accumulation_do_not_change_an_example(alone, world, workers, accumulate):
    seen, reports = read(lambda: stream(seed=1), world, workers, accumulate=accumulate)
    assert len(seen) == 48 and equal(seen, alone[0])
    assert sum(r['tokenised'] for r in reports) < 2 * alone[1][0]['tokenised']          # half of these documents are tried in vain
    if world > 1: assert max(r['tokenised'] for r in reports) < alone[1][0]['tokenised']
    assert {r['min_bytes'] for r in reports} == {alone[1][0]['min_bytes']}


@pytest.mark.parametrize('start', [1, 4, 5])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_start_in_the_middle_reads_what_follows(alone, start, workers):
    seen, _ = read(lambda: stream(seed=1), 2, workers, start)
    assert equal(seen, {i: e for i, e in alone[0].items() if i >= 8 * start})


@pytest.mark.parametrize('kind', ['jsonl', 'gz', 'parquet', 'folder'])
def test_files_are_streamed_with_workers_after_they_were_opened_here(corpus, kind):
    make = lambda: StreamDataset(getattr(corpus, kind), TOK, SAMPLER, seed=1, bos=0)
    assert equal(read(make, workers=2)[0], read(make)[0])


def test_a_stream_can_be_sent_to_another_process():
    one = StreamDataset('stdlib', words(), SAMPLER); one[3]
    two = pickle.loads(pickle.dumps(one))
    assert all(torch.equal(v, two[4][k]) for k, v in one[4].items())


def net(): return make_model(vocab=300)
FAST = TrainSettings(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1)
def losses(r): return [h['loss'] for h in r.history]

@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_equals_one_that_never_stopped(corpus, tmp_path, workers):
    def data(): return open_sources([f'{corpus.jsonl}:2', f'{corpus.gz}:1'], TOK, SAMPLER, bos=0, stream=True)
    s = replace(FAST, dataloader_num_workers=workers, save_steps=2, save_total_limit=9)
    want = train(a := net(), data(), FAST, progress=False)
    got = train(b := net(), data(), s, tmp_path, progress=False)
    again = train(c := net(), data(), s, tmp_path, resume=tmp_path/'checkpoint-4', progress=False)
    assert losses(want) == losses(got) == losses(again)
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters()): assert torch.equal(p, q) and torch.equal(p, r)
    assert set(got.data['sources']) == {str(corpus.jsonl), str(corpus.gz)} and all(r['tokenised'] for r in got.data['sources'].values())


TWO = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_sources import FAST, SAMPLER, TOK, losses, net, open_sources, replace, train
from accelerate import PartialState
s = replace(FAST, max_steps=3, per_device_train_batch_size=2)
streamed = train(net(), open_sources([sys.argv[2] + ':2', sys.argv[3] + ':1'], TOK, SAMPLER, bos=0, stream=True), s, progress=False)
kept = train(net(), open_sources([sys.argv[2] + ':2', sys.argv[3] + ':1'], TOK, SAMPLER, bos=0, cache_dir=sys.argv[4] + '/c', progress=False), s, progress=False)
if PartialState().is_main_process: torch.save([PartialState().num_processes, losses(streamed), losses(kept)], sys.argv[4] + '/seen.pt')
from pose_nb.engines import leave
leave(0)
"""

def test_two_real_processes_read_streams_and_stores_as_one_does(corpus, tmp_path):
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    (tmp_path/'two.py').write_text(TWO)
    names = [f'{corpus.jsonl}', f'{corpus.folder}']
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(port), str(tmp_path/'two.py'), str(Path(__file__).parent), *names, str(tmp_path)]
    job = subprocess.Popen(command, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = job.communicate(timeout=150)
    finally: job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, out[-3000:]
    world, streamed, kept = torch.load(tmp_path/'seen.pt')
    s, both = replace(FAST, max_steps=3), [f'{names[0]}:2', f'{names[1]}:1']
    one = losses(train(net(), open_sources(both, TOK, SAMPLER, bos=0, stream=True), s, progress=False))
    two = losses(train(net(), open_sources(both, TOK, SAMPLER, bos=0, cache_dir=tmp_path/'d', progress=False), s, progress=False))
    assert world == 2 and np.allclose(streamed, one, atol=1e-5) and np.allclose(kept, two, atol=1e-5) and not np.allclose(one, two, atol=1e-3)
    assert len(whole(tmp_path/'c')) == 2 and not hidden(tmp_path/'c')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_source_that_ends_early_says_how_much_there_was(corpus, workers):
    data = open_sources(corpus.folder, TOK, SAMPLER, bos=0, stream=True, repeat=False, examples=24)
    with pytest.raises(PoseError, match='ended after 6 examples and the run needs 24; pass more data, train fewer steps, or let the stream repeat'):
        train(net(), data, replace(FAST, dataloader_num_workers=workers), progress=False)
    assert train(net(), open_sources(corpus.folder, TOK, SAMPLER, bos=0, stream=True), FAST, progress=False).step == 6


def test_a_stream_whose_end_is_too_short_begins_again_or_says_so():
    sizes = [70, 80, 60, 60]                                    # the last two have bytes enough and too few tokens
    s = stream(sizes, min_bytes=1)
    assert [s.document(i) for i in range(6)] == [(0, 0), (0, 1), (0, 0), (0, 0), (1, 0), (1, 1)]
    with pytest.raises(PoseError, match='ended after 2 examples and example 2 was asked for'): stream(sizes, min_bytes=1, repeat=False)[2]


def test_a_pass_without_a_document_that_suits_is_an_error_not_a_loop():
    with pytest.raises(PoseError, match='none of the 3 documents .* suits a window of 64 tokens'): stream([60] * 3, min_bytes=1)[0]
    with pytest.raises(PoseError, match='has no document of at least 100,000 bytes'): stream(min_bytes=10**5)[7]
    with pytest.raises(PoseError, match='holds no text'): StreamDataset(lambda: iter(()), TOK, SAMPLER)
    with pytest.raises(PoseError, match='min_bytes is 0'): stream(min_bytes=0)
    turns = Turns(64, 256, (words().vocab['river'],))
    with pytest.raises(PoseError, match='none of the 2 documents'): StreamDataset(lambda: iter(['the sea ' * 90] * 2), words(), turns, min_bytes=1)[0]
    s = StreamDataset(lambda: iter(['the sea ' * 90, 'the sea river ' * 90]), words(), turns, min_bytes=1)
    assert s.document(0) == s.document(1) == (0, 1) and len(s[0]['input_ids']) == 64


def test_a_stream_that_breaks_says_where():
    def breaks():
        yield from documents()[:20]
        raise ConnectionError('the line is dead')
    with pytest.raises(PoseError, match=r'broke after 20 documents \(ConnectionError: the line is dead\)'): StreamDataset(breaks, words(), SAMPLER, min_bytes=200)[40]


def test_nothing_is_tokenised_on_the_way_and_the_counts_are_true():
    s = stream(seed=1, min_bytes=250)
    s[20]
    texts = documents(); candidates = [n for n, t in enumerate(texts) if len(t) >= 250]
    n = s.document(20)[1]
    assert s.report['documents'] == n + 1 and s.report['small'] == sum(len(t) < 250 for t in texts[:n + 1])
    assert s.report['tokenised'] == candidates.index(n) - 20 + 1 and s.report['short'] == s.report['tokenised'] - 1
    assert s.report['tokens'] == sum(SIZES[c] for c in candidates[20:candidates.index(n) + 1])
