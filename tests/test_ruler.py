import json, random, re
from collections import Counter
from dataclasses import replace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

import pose_nb.ruler as R
from conftest import make_model, make_tokenizer
from pose_nb.answers import Reader, make_trials, retrieve, trial_rng
from pose_nb.common import PoseError
from pose_nb.ruler import (ADJECTIVES, CWE, CWE_PREFIX, FWE, FWE_PREFIX, NEEDLE, NIAH, NIAH_PREFIX, NOUNS, QA, QA_PREFIX, QA_TASK, REPEAT, RULER, VT, VT_PREFIX, CommonWords,
                           FrequentWords, Niah, RulerResult, VariableTracking, continuation, found, key_words, largest, list_words, questions, ruler, ruler_scores, ruler_task,
                           singular, tidy, weighted_mean, zipf_counts)

TOK = make_tokenizer(vocab=600)
NEEDLES = [n for n in RULER if n.startswith('niah')]
FREE = [n for n in RULER if not n.startswith('qa')]
MANY = dict(niah_single_1=160, niah_single_2=160, niah_single_3=160, niah_multikey_1=160, niah_multikey_2=160, niah_multikey_3=160, niah_multivalue=160, niah_multiquery=160, vt=80, cwe=250, fwe=60)   # new tokens: this tokenizer is nearly one of letters


def mini(name, **kw): return ruler_task(name, **dict(new_tokens=MANY[name]) | (dict(example=0) if name == 'vt' else dict(example=False) if name == 'cwe' else {}) | kw)


def prompts(task, length, n=5, depth=None, seed=0): return [task.prompt(TOK, length, depth, trial_rng(seed, length, i), 0) for i in range(n)]


def text(p): return TOK.decode(p.ids[1:])


@pytest.fixture(scope='module')
def dev(tmp_path_factory):
    p = tmp_path_factory.mktemp('qa')/'dev.jsonl'
    names = [f'{a.title()} {n.title()}' for a, n in zip(ADJECTIVES[:60], NOUNS[:60])]
    rows = [dict(question=f'Who founded town {i}?', answers=[who, who.split()[1]], title=f'T{i // 5}', context=f'Town {i} is old. It was founded by {who} long ago, on a {NOUNS[i + 90]}.') for i, who in enumerate(names)]
    p.write_text('\n'.join(map(json.dumps, rows)))
    return str(p)


# Readers that know the answer from the text alone

def oracle(text):
    "Answers any of the tasks by reading the prompt."
    if text.rstrip().endswith('Answer:'):
        town = re.findall(r'Who founded (town \d+)\?', text)[-1]
        return ' ' + re.search(rf'{town} is old. It was founded by (\w+ \w+)', text, re.I).group(1) + '.'
    if 'VAR ' in text:
        last = text[text.rindex('Memorize and track'):]
        value, known = re.search(r'assigned the value (\d+)', last).group(1), []
        for name, what in re.findall(r'VAR (\w+) = (?:VAR )?(\w+)', last):
            if what == value or what in known: known.append(name)
        return ' ' + ' '.join(known) + '.'
    if 'numbered list' in text:
        words = re.findall(r'\d+\. (\S+)', text[text.rindex('Below is a numbered list'):])
        return ' '.join(f'{i}. {w}' for i, (w, _) in enumerate(Counter(words).most_common(10), 1)) + '.'
    if 'coded text' in text:
        words = text[text.index('coded words. ') + 13:text.index('\nQuestion')].split()
        return ' ' + ' '.join(w for w, _ in Counter(words).most_common(4) if w != '...') + '.'
    asked = re.findall(r'for ([^:]+) mentioned', text)[-1]
    keys = re.findall(r'[0-9a-f]{8}(?:-[0-9a-f]+){4}|[a-z]+-[a-z]+', asked)
    return ' ' + ', '.join(v for k in keys for v in re.findall(rf'for {k} is: (\S+)\.', text)) + '.'


@pytest.mark.parametrize('official', [False, True])
@pytest.mark.parametrize('name', FREE)
def test_someone_who_reads_the_prompt_is_right(name, official):
    task = mini(name, official=official)
    length = {'niah_single_2': 6000, 'niah_single_3': 6000, 'niah_multikey_1': 6000, 'niah_multivalue': 6000, 'niah_multiquery': 6000}.get(name, 2000) if official else 1400
    for p in prompts(task, length, 12):
        reply = oracle(text(p))
        assert task.mark(reply, p) == 1 and task.finished(reply, p), (reply, p.references)
        assert task.mark(' nothing.', p) == 0 and not task.finished(' nothing.', p)
        assert task.mark(TOK.decode(p.answer), p) == 1                       # the teacher's answer is right
        if p.facts.get('repeated') is not None and not official: assert not p.facts['repeated']


@pytest.mark.parametrize('name', ['niah_single_1', 'niah_multiquery', 'vt', 'fwe'])
def test_a_reader_through_the_whole_way(name):
    task = mini(name)
    ends = dict(niah_single_1='provided text is', niah_multiquery='provided text are', vt='they are:', fwe='frequently appeared words are:')[name]
    got = retrieve(Reader(TOK, oracle, ends), TOK, task, 900, trials=3, progress=False)
    assert got.accuracy == {900: 1.} and all(t['written'] < task.new_tokens for t in got.trials)       # stops when it is finished
    assert got.rows[0].task == name and (got.rows[0].forced == 1 or name in ('niah_multiquery', 'fwe'))       # these have other right replies as well


def test_questions_through_the_whole_way(dev):
    got = retrieve(Reader(TOK, oracle, 'Answer:'), TOK, ruler_task('qa_1', file=dev, new_tokens=40), 900, depths=(0, .5, 1), trials=4, progress=False)
    assert got.accuracy == {900: 1.}
    assert all(abs(t['place'] - t['depth']) < .2 for t in got.trials)


# What is promised of every prompt

@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FREE), st.integers(0, 2**40), st.integers(0, 900), st.booleans(), st.booleans())
def test_prompts_fit_and_hold_their_answer(name, seed, extra, bos, official):
    task, length = mini(name, official=official), (6000 if official and name in NEEDLES else 1400) + extra
    p = task.prompt(TOK, length, None, trial_rng(seed, length, 0), 0 if bos else None)
    assert len(p.ids) + (0 if official and name == 'fwe' else task.new_tokens) <= length and (p.ids[0] == 0) == bos
    body = TOK.decode(p.ids[bos:])
    assert p.ids[bos:] == TOK(body, add_special_tokens=False)['input_ids']                 # the text, whole and untouched
    assert p.references and all(r in body for r in p.references) and 1 <= len(p.answer) <= task.new_tokens
    if name in NEEDLES and not official:
        assert all(body.count(f'is: {r}.') == 1 for r in p.references)                     # one needle each, whole
        keys = re.findall(r'One of the special magic \w+ for (\S+) is:', body)
        values = re.findall(r' is: (\S+)\.', body)
        assert len(set(values)) == len(values) and len(set(keys)) == len(keys) // task.values
    if name in NEEDLES: assert len(re.findall(r'One of the special magic', body)) == max(task.keys, task.queries) * task.values + p.facts['units'] * (task.haystack == 'needle')
    again = task.prompt(TOK, length, None, trial_rng(seed, length, 0), 0 if bos else None)
    assert again == p


@pytest.mark.parametrize('name', FREE)
def test_one_unit_more_would_not_fit(name):
    task = mini(name)
    for i, length in enumerate(range(1400, 1480, 7)):
        p, seed = task.prompt(TOK, length, None, trial_rng(0, length, i), 0), int(trial_rng(0, length, i).integers(2**62))
        d = task.builder(TOK, length, None, seed)(p.facts['units'] + 1)
        assert len(TOK(d.text + d.prefix, add_special_tokens=False)['input_ids']) + 1 + task.new_tokens > length


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 400), st.floats(.3, 30), st.integers(0, 40_000), st.integers(1, 30), st.integers(1, 500), st.one_of(st.none(), st.integers(1, 3000)))
def test_the_search_finds_the_largest_and_ends(fixed, per, budget, least, step, most):
    if most is not None: most = max(most, least)
    looks, count = [], lambda n: looks.append(n) or fixed + int(per * n)
    got = largest(count, budget, least, step, most)
    if got is None: assert count(least) > budget; return
    assert count(got) <= budget and (got - least) % step == 0 and (most is None or got <= most)
    assert count(got + step) > budget or (most is not None and got + step > most) or (most is None and got >= 4 * budget * step)
    assert len(looks) < 40


def test_a_tokenizer_that_writes_spaces_in_front():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    sample = [NIAH, NIAH_PREFIX, REPEAT, VT, VT_PREFIX, CWE, FWE, *key_words()[::40], *map(str, range(300)), *list_words()[::3], ' '.join('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789')]
    bpe.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=900, special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))], show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    for name in FREE:
        task = mini(name)
        p = task.prompt(tok, 1400, None, trial_rng(0, 1400, 0), 1)
        assert len(p.ids) + task.new_tokens <= 1400 and task.mark(tok.decode(p.answer), p) == 1 and task.mark(oracle(tok.decode(p.ids[1:])), p) == 1, name


def test_few_looks_for_a_long_prompt():
    n = []
    real = R._encode
    for name in ('niah_single_1', 'niah_single_2', 'fwe'):
        task = mini(name); n.clear()
        with pytest.MonkeyPatch.context() as m:
            m.setattr(R, '_encode', lambda *a: n.append(1) or real(*a))
            p = task.prompt(TOK, 32_768, None, trial_rng(0, 32_768, 0), 0)
        assert len(n) <= 20 and len(p.ids) > 32_768 - 400, (name, len(n))


# The wording

def test_strings_are_the_protocol():
    assert NEEDLE == 'One of the special magic {type_v} for {key} is: {value}.' and REPEAT.startswith('The grass is green. The sky is blue.')
    assert NIAH.startswith('Some special magic {type_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the {type_v} afterwards.\n{context}\nWhat are all')
    assert singular(NIAH_PREFIX) == ' The special magic {type_v} for {query} mentioned in the provided text is' and 'is the special magic' in singular(NIAH) and singular(NIAH).startswith('A special')
    assert 'variables are assgined the value' in VT_PREFIX and VT_PREFIX.endswith('they are: ') and VT.startswith('Memorize and track the chain(s)')
    assert CWE.format(context='x', common=10).endswith('What are the 10 most common words in the above list?') and CWE_PREFIX.format(common=10) == ' Answer: The top 10 words that appear most often in the list are:'
    assert FWE.count("'....'") == 1 and FWE_PREFIX.endswith('three most frequently appeared words are:') and QA_PREFIX == ' Answer:' and QA_TASK.count('Only give me the answer') == 2
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS) and len(key_words()) > 40_000 and len(set(list_words())) == len(list_words()) > 1000


def test_the_strings_of_another_port():
    "Ours against those of lm-evaluation-harness, where that is installed with what its modules need."
    import importlib.util
    from pathlib import Path
    spec = importlib.util.find_spec('lm_eval')
    if spec is None: pytest.skip('lm_eval is not installed')
    folder = Path(spec.origin).parent/'tasks'/'ruler'
    source = {n: (folder/f'{n}_utils.py').read_text() for n in ('niah', 'vt', 'cwe', 'fwe', 'qa')}
    plain = lambda s: s.replace('{type_v}', '{type_needle_v}').replace('{common}', '10').replace('\n', '\\n')
    for n, parts in dict(niah=[NIAH], vt=[VT, VT_PREFIX], cwe=[CWE, CWE_PREFIX], fwe=[FWE, FWE_PREFIX], qa=[QA_TASK]).items():
        for s in parts: assert plain(s) in source[n], (n, s)


def test_frequent_words_as_another_port_has_them():
    "The same counts in the same order, and the same number of words, as the code of lm-evaluation-harness makes with the official settings."
    theirs = pytest.importorskip('lm_eval.tasks.ruler.fwe_utils', exc_type=ImportError)
    plain = make_tokenizer(bos=False)
    pattern = lambda text: [w == '...' for w in text.split('coded words. ')[1].split('\nQuestion')[0].split()]
    for length in (1024, 2048):
        random.seed(0)
        said, answer, n = theirs.generate_input_output(length, plain, vocab_size=length // 50, incremental=length // 32)
        draft = FrequentWords(official=True).builder(plain, length, None, 0)
        ours = draft(n)
        assert pattern(ours.text) == pattern(said) and len(answer) == 3
        where = lambda text, words: [[i for i, x in enumerate(text.split('coded words. ')[1].split()) if x == w] for w in words]
        assert where(ours.text, ours.references) == where(said, answer)
        assert (n - FrequentWords(official=True).units(length)[0]) % (length // 32) == 0


def test_the_answering_document_stands_where_another_port_puts_it(dev):
    theirs = pytest.importorskip('lm_eval.tasks.ruler.qa_utils', exc_type=ImportError)
    asked, docs = questions(dev)
    qas = [dict(query=q, outputs=a, context=own, more_context=more) for q, a, own, more in asked]
    task = QA(file=dev, official=True)
    for n in (10, 20, 30):
        said, _ = theirs.generate_input_output(7, n, qas, docs)
        mine = task.builder(TOK, 4000, None, 3)(n)
        gold = lambda text: [f'{re.search(r"founded (town [0-9]+)", text).group(1)} is old' in d.lower() for d in re.split(r'Document \d+:', text)[1:]]
        assert gold(mine.text).index(True) == gold(said).index(True) and len(gold(said)) == len(gold(mine.text)) == n
        shape = lambda text: re.sub(r'own \d+|by \w+ \w+|a \w+\.', '', text)
        assert shape(mine.text) == shape(said)                                                  # all but the facts


def test_the_presets_are_those_of_the_table():
    f = lambda n: (RULER[n].haystack, RULER[n].key_type, RULER[n].value_type, RULER[n].keys, RULER[n].values, RULER[n].queries)
    assert f('niah_single_1') == ('repeat', 'words', 'numbers', 1, 1, 1) and f('niah_single_3') == ('essay', 'words', 'uuids', 1, 1, 1)
    assert f('niah_multikey_1') == ('essay', 'words', 'numbers', 4, 1, 1) and f('niah_multikey_3') == ('needle', 'uuids', 'uuids', 1, 1, 1)
    assert f('niah_multivalue') == ('essay', 'words', 'numbers', 1, 4, 1) and f('niah_multiquery') == ('essay', 'words', 'numbers', 4, 1, 4)
    assert [RULER[n].new_tokens for n in ('niah_single_1', 'vt', 'cwe', 'fwe', 'qa_1', 'qa_2')] == [128, 30, 120, 50, 32, 32] and len(RULER) == 13


def test_the_shape_of_each_prompt():
    q = prompts(mini('niah_multiquery'), 1200, 1)[0]
    assert re.search(r'What are all the special magic numbers for (\S+), (\S+), (\S+), and (\S+) mentioned', text(q)) and len(q.references) == 4
    v = prompts(mini('niah_multivalue'), 1200, 1)[0]
    assert len(v.references) == 4 and text(v).count(re.findall(r'for (\S+) mentioned', text(v))[0]) == 6
    vt = prompts(mini('vt', example=700), 2400, 1)[0]
    assert text(vt).count('assgined') == 2 and text(vt).count('Memorize and track') == 2 and len(re.findall(r'VAR [A-Z]{3} =', text(vt))) == 5 == len(re.findall(r'VAR [A-Z]{5} =', text(vt)))
    cwe = prompts(mini('cwe', example=True), 3200, 1)[0]
    assert text(cwe).count('Question: What are the 10 most common words') == 2 and 'list are:1. ' in text(cwe)
    long = prompts(mini('cwe'), 12_000, 1)[0]
    last = Counter(re.findall(r'\d+\. (\S+)', text(long)))
    assert {last[w] for w in long.references} == {30} and set(last.values()) == {30, 3}
    chains = prompts(mini('vt', chains=3, hops=2), 1500, 4)
    assert all(len(re.findall('VAR .{5} = ', text(p))) == 9 and len(p.references) == 3 for p in chains)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 3))
def test_variables_by_running_them(seed, hops, chains):
    p = prompts(VariableTracking(new_tokens=200, example=0, hops=hops, chains=chains), 3000, 1, seed=seed)[0]
    memory = {}
    for name, what in re.findall(r'VAR (\w+) = (?:VAR )?(\w+)', text(p)): memory[name] = memory.get(what, what)     # in order, each value known before
    assert all(v.isdigit() for v in memory.values())
    assert sorted(n for n, v in memory.items() if v == str(p.facts['value'])) == sorted(p.references) and len(p.references) == hops + 1
    assert len(memory) == chains * (hops + 1) and len(set(memory.values())) == chains


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**9), st.booleans(), st.one_of(st.integers(900, 3000), st.integers(5000, 6000)))
def test_words_by_counting_them(seed, official, length):
    p = prompts(mini('cwe', official=official, new_tokens=200), length + 900, 1, seed=seed)[0]
    top = Counter(re.findall(r'\d+\. (\S+)', text(p))).most_common(11)
    assert {w for w, _ in top[:10]} == set(p.references) and (len(top) == 10 or top[9][1] > top[10][1])
    f = prompts(mini('fwe', official=official), length, 1, seed=seed)[0]
    words = Counter(text(f)[text(f).index('coded words. ') + 13:].split('\nQuestion')[0].split())
    assert words.most_common(1)[0][0] == '...' and [w for w, _ in words.most_common(4)][1:] == f.references
    if not official: assert len(set(words[w] for w in f.references)) == 3 and sorted(words.values())[-4] > ([0] * 5 + sorted(words.values()))[-5]


def test_golden_counts():
    assert zipf_counts(1000, 5).tolist() == [607, 151, 67, 37, 24]
    for alpha in (1.2, 1.5, 2., 3.5, 4.):
        n = R._untied(alpha)
        assert all((c := zipf_counts(k, 5, alpha))[3] > c[4] for k in range(n, n + 500)) and (c := zipf_counts(n - 1, 5, alpha))[3] == c[4]


# Depth

@pytest.mark.parametrize('name', NEEDLES)
def test_depth_places_the_needle_that_is_asked_for(name):
    for official in (False, True):
        task = mini(name, official=official)
        where = []
        for d in (0., .5, 1.):
            p = prompts(task, 6000, 1, d)[0]
            body = text(p)
            body = body[body.index('afterwards.\n'):body.rindex('\nWhat ')]
            where.append(body.index(f'is: {p.references[0]}.') / len(body))
        assert where[0] < .12 and .3 < where[1] < .7 and where[2] > .88, (official, where)
    a, b = (prompts(mini(name), 1500, 1, d)[0] for d in (0., 1.))
    assert a.references == b.references                                     # the same question at every depth


@pytest.mark.parametrize('name', ['vt', 'cwe', 'fwe'])
def test_depth_is_ignored_where_there_is_no_place(name): assert prompts(mini(name), 1500, 2, 0.) == prompts(mini(name), 1500, 2, 1.) == prompts(mini(name), 1500, 2)


def test_uniform_places_are_uniform():
    places = [p.facts['place'] for p in prompts(mini('niah_single_1', new_tokens=20), 700, 400)]
    assert min(places) == 0 and max(places) == 1 and abs(np.mean(places) - .5) < .06


# Official or mended

def test_official_shuffles_are_the_same_in_every_sample(dev):
    place = lambda official: {p.facts['place'] for p in prompts(QA(file=dev, official=official), 1300, 20)}
    assert len(place(True)) == 1 and len(place(False)) > 8
    orders = lambda official: {(p.facts['units'], *(w in p.references for w in re.findall(r'\d+\. (\S+)', text(p)))) for p in prompts(mini('cwe', official=official), 1400, 12)}
    units = lambda orders: {o[0] for o in orders}
    assert len(orders(True)) == len(units(orders(True))) and len(orders(False)) > len(units(orders(False)))
    letters = lambda official: {p.references[0][0] for p in prompts(mini('fwe', official=official), 4000, 30)}
    assert len(letters(True)) < len(letters(False))
    used = lambda official: {tuple(map(bool, re.findall('(VAR )|\n', text(p)[:text(p).index('\n\n\n\n')]))) for p in prompts(mini('vt', example=1100, official=official), 3000, 6)}
    assert len(used(True)) < len(used(False))


def test_official_examples_have_new_names(): assert len({tuple(re.findall(r'VAR ([A-Z]{3}) =', text(p))) for p in prompts(mini('vt', example=1100, official=True), 3000, 5)}) == 5


def test_official_keys_may_repeat_and_ours_do_not():
    few = key_words()[:100]
    seen = {o: [p.facts['repeated'] for p in prompts(mini('niah_multikey_2', words=few, official=o), 2000, 40)] for o in (True, False)}
    assert any(seen[True]) and not any(seen[False])


def test_official_units_come_in_steps():
    assert {p.facts['units'] % 5 for p in prompts(mini('niah_single_1', official=True), 1500, 3)} == {0}
    assert {p.facts['units'] % 25 for p in prompts(mini('niah_single_1', official=True), 5000, 3)} == {0}
    assert {p.facts['units'] % 500 for p in prompts(mini('niah_single_2', official=True), 6000, 3)} == {0}
    assert {p.facts['units'] % 10 for t in ('vt', 'cwe') for p in prompts(mini(t, official=True), 3000, 3)} == {0}


def test_official_frequent_words_forget_the_reply():
    assert all(len(prompts(mini('fwe', official=True), n, 1)[0].ids) <= n for n in range(1400, 1500, 3))
    with pytest.raises(PoseError, match='does not fit into'): [make_trials(mini('fwe', official=True), TOK, (n,), trials=1) for n in range(1400, 1500, 3)]
    for n in range(1400, 1500, 3): make_trials(mini('fwe'), TOK, (n,), trials=1)


def test_grammar_stays_in_the_task():
    chat = 'You are some help. Some. {task} Where are answers? '
    heads = {o: text(prompts(mini('niah_single_1', official=o, chat=chat), 900, 1)[0]) for o in (True, False)}
    assert heads[True].startswith('You is some help. A. A special magic number is hidden') and ' Where is answer? ' in heads[True]
    assert heads[False].startswith('You are some help. Some. A special magic number is hidden') and ' Where are answers? ' in heads[False]
    essay = 'There are all sorts of birds. Some are answers. ' * 40
    for o in (True, False):
        body = text(prompts(Niah(new_tokens=20, text=essay * (12 if o else 1), official=o), 4000, 1)[0])
        assert 'There are all sorts of birds.' in body and 'There is sorts' not in body
    assert text(prompts(mini('niah_multiquery', chat=chat), 1200, 1)[0]).startswith('You are some help. Some. Some special magic numbers are hidden')


def test_no_lone_space_at_the_end_unless_official():
    assert text(prompts(mini('vt'), 900, 1)[0]).endswith('they are:') and text(prompts(mini('vt', official=True), 1200, 1)[0]).endswith('they are: ')


def test_marks():
    p = prompts(mini('niah_single_1'), 900, 1)[0]; number = p.references[0]
    ours, theirs = mini('niah_single_1'), mini('niah_single_1', official=True)
    for reply, a, b in ((f' {number}.', 1, 1), (f'{number}', 1, 1), (f' 9{number}', 0, 1), (f' {number}0', 0, 1), (f'\x00{number}\x1f', 1, 1), (f' {number[:3]} {number[3:]}', 0, 0), ('', 0, 0)):
        assert (ours.mark(reply, p), theirs.mark(reply, p)) == (a, b), reply
    assert not ours.finished(f' {number}', p) and ours.finished(f' {number},', p) and theirs.finished(f' {number}', p)
    many = prompts(mini('niah_multivalue'), 1200, 1)[0]
    assert mini('niah_multivalue').mark(' '.join(many.references[:3]), many) == .75
    assert tidy(' \ta\x0bb\x1f ') == 'a\nb' and found('The ART of', 'art') and not found('start', 'art') and found('start', 'art', True) and not found('x1', '1') and found('($5)', '$5')


@settings(deadline=None, max_examples=100)
@given(st.text('01 ,.', max_size=12), st.text('01 ,.ab', max_size=6), st.booleans())
def test_finished_is_final(reply, more, official):
    task, p = Niah(official=official), R.Prompt([0], [0], ['01', '10'], {})
    if task.finished(reply, p): assert task.mark(reply, p) == 1 == task.mark(reply + more, p) and task.finished(reply + more, p)


# Scores

def test_golden_scores():
    row = dict(zip([4096 << i for i in range(6)], (.955, .938, .916, .874, .847, .770)))
    s = ruler_scores({'a': row})
    assert (s['increasing'], s['decreasing'], s['mean'], s['effective'], s['effective_last']) == (85.38, 91.29, 88.33, 32_768, 32_768)
    s = ruler_scores({'a': dict(zip(row, (.966, .963, .952, .932, .870, .812)))})
    assert (s['increasing'], s['decreasing'], s['mean'], s['effective']) == (89.04, 94.13, 91.58, 65_536)
    two = ruler_scores({'a': {10: 1., 20: .5, 40: 1.}, 'b': {10: .9, 20: .9, 40: .9}})
    assert two['average'] == {10: 95., 20: 70., 40: 95.} and (two['effective'], two['effective_last']) == (10, 40)
    assert ruler_scores({'a': {10: .5}})['effective'] == 0 == ruler_scores({'a': {10: .5}})['effective_last'] and ruler_scores({'a': {10: .5}}, .5)['effective'] == 10
    assert weighted_mean([1, 0]) == pytest.approx(1 / 3) and weighted_mean([1, 0], False) == pytest.approx(2 / 3)


def test_match_examples_of_the_source(dev):
    p = R.Prompt([0], [0], ['A1', 'c3'], {})
    assert Niah(official=True).mark('a1 b2', p) == .5 and QA(official=True).mark('a1 b2', p) == 1. and QA(official=True, metric='mean').mark('a1 b2', p) == .5
    assert QA().finished('a1 b2', p) and not QA(metric='mean').finished('a1 b2', p)


@pytest.mark.parametrize('marks, why', [({}, 'no marks'), ({'a': {}}, 'no marks'), ({'a': {10: 1}, 'b': {20: 1}}, 'same lengths')])
def test_scores_refuse(marks, why):
    with pytest.raises(PoseError, match=why): ruler_scores(marks)


@pytest.mark.parametrize('threshold', [85.6, -1, 'high', float('nan')])
def test_thresholds_are_shares(threshold):
    with pytest.raises(PoseError, match='threshold'): ruler_scores({'a': {10: 1.}}, threshold)


def test_several_tasks(tmp_path):
    model = make_model(vocab=len(TOK))
    got = ruler(model, TOK, [mini('niah_single_1', new_tokens=12), mini('fwe', new_tokens=30), mini('vt')], lengths=(700, 900), trials=2, progress=False)
    assert list(got.marks) == ['niah_single_1', 'fwe', 'vt'] and got.scores()['effective'] == 0 and got.scores(0.)['effective'] == 900
    d = json.loads(json.dumps(got.to_dict()))
    assert d['threshold'] == .856 and d['tasks']['vt']['rows'][0]['protocol']['hops'] == 4 and d['scores']['average'] == {'700': 0., '900': 0.}
    assert got.table()['task'].tolist() == ['niah_single_1', 'fwe', 'vt', 'average'] and len(got.probabilities()) == 3
    ax = got.plot(); assert len(ax.lines) == 5; ax.figure.savefig(tmp_path/'x.svg')
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['needles', 'variables', 'words']
    again = ruler(model, TOK, [mini('vt')], lengths=900, trials=2, progress=False)
    again.plot().figure.savefig(tmp_path/'y.svg')
    assert [t['reply'] for t in again.answers['vt'].trials] == [t['reply'] for t in got.answers['vt'].trials if t['length'] == 900]


def test_long_settings_are_told_by_their_size():
    task = Niah(text='One two. ' * 100, words=key_words()[:300])
    assert task.protocol()['text'] == '900 characters' and task.protocol()['words'] == '300 words' and Niah().protocol()['text'] is None
    json.dumps(task.protocol())


def test_a_short_text_is_repeated():
    body = text(prompts(Niah(new_tokens=20, text='Birds sing at dawn. Fish do not.'), 700, 1)[0])
    assert body.count('Birds sing at dawn.') > 10


def test_continuation_with_merges():
    for prefix, answer in ((' are', ' 12'), ('are:', '1. the'), (' they are: ', ' the sea'), (' they are: ', 'the sea')):
        ids = continuation(TOK, prefix, answer)
        assert TOK.decode(ids) == answer


# Files of questions

def test_forms_of_files(tmp_path):
    flat = dict(question='Q?', answers=['a', 'b', 'a'], context='It is a.')
    def read(name, obj): p = tmp_path/name; p.write_text(obj if isinstance(obj, str) else json.dumps(obj)); return questions(p)
    want = ([('Q?', ['a', 'b'], [0], [])], ['It is a.'])
    assert read('1.json', [flat]) == want and read('2.json', flat) == want and read('3.jsonl', json.dumps(flat) + '\n\n') == want
    assert read('4.json', [flat | dict(answers=dict(text=['a', 'b'], answer_start=[1, 2]))]) == want and read('5.json', [flat | dict(answers=[dict(text='a'), dict(text='b')])]) == want
    squad = dict(data=[dict(title='T', paragraphs=[dict(context='It is a.', qas=[dict(question='Q?', answers=[dict(text='a')]), dict(question='R?', answers=[], is_impossible=True)]), dict(context='It is b.', qas=[dict(question='S?', answers=[dict(text='b')])])])])
    assert read('6.json', squad) == ([('Q?', ['a'], [0], [1]), ('S?', ['b'], [1], [0])], ['It is a.', 'It is b.'])
    hotpot = [dict(question='Q?', answer='yes', context=[['T', ['One. ', 'Two.']], ['U', ['Three.']]])]
    assert read('7.json', hotpot) == ([('Q?', ['yes'], [0, 1], [])], ['T\nOne. Two.', 'U\nThree.'])
    assert read('1.json', [flat | dict(question='New?')])[0][0][0] == 'New?'               # a file that changed is read again
    task = QA(file=str(tmp_path/'7.json'), new_tokens=20)                                  # 'yes' is nowhere in the documents, and the file is too small for more than it holds
    with pytest.raises(PoseError, match='only 2 units'): prompts(task, 3000, 1)


def test_own_documents_come_along(dev):
    for official in (False, True):
        for p in prompts(QA(file=dev, official=official), 1500, 10):
            n = re.search(r'Who founded (town \d+)\?', text(p)).group(1)
            assert text(p).lower().count(f'{n} is old') == 1 and p.references[0] in text(p)
            docs = re.findall(r'Document (\d+):', text(p)); assert docs == [str(i + 1) for i in range(len(docs))] and p.facts['units'] == len(docs)


@pytest.mark.parametrize('content, why', [(None, 'is not a file here'), ('', 'holds no questions'), ('[]', 'holds no questions'), ('{"data": []}', 'holds no questions'), ('[{"question": "Wh', 'not a file of questions'),
    ('plain text', 'not a file of questions'), ('5', 'not a file of questions'), ('["a"]', 'not a file of questions'), ('{"query": "Q?"}', 'not a file of questions'), ('{"question": "Q?", "answers": [], "context": "c"}', 'lacks'),
    ('{"question": "Q?", "answers": ["a"]}', 'lacks'), ('{"question": "Q?", "answers": ["a"], "context": " "}', 'lacks'), ('{"question": 5, "answers": ["a"], "context": "c"}', 'lacks'), ('{"question": "Q?", "answers": "a", "context": 5}', 'not a file|lacks'),
    (b'\xff\xfe\x00', 'cannot be read'), ('{"question": "Q?", "answers": ["a"], "context": [["t"]]}', 'not a file')])
def test_bad_files(tmp_path, content, why):
    p = tmp_path/'q.json'
    if content is not None: (p.write_bytes if isinstance(content, bytes) else p.write_text)(content)
    with pytest.raises(PoseError, match=why): ruler(make_model(vocab=len(TOK)), TOK, QA(file=str(p)), lengths=300, trials=1)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(PoseError, match='is not a file here'): questions(tmp_path)


# Bad requests

def test_bad_requests(dev):
    model = make_model(vocab=len(TOK))
    ask = lambda tasks, **kw: ruler(model, TOK, tasks, **dict(lengths=900, trials=1) | kw)
    with pytest.raises(PoseError, match='choose one of: niah_single_1, .*qa_2'): ask('niah_double')
    with pytest.raises(PoseError, match='choose one of'): ruler_task('nope')
    with pytest.raises(PoseError, match="no option 'hop'; it has: .*hops"): ruler_task('vt', hop=3)
    with pytest.raises(PoseError, match='name of its own'): ask(['vt', 'vt'])
    with pytest.raises(PoseError, match='at least one'): ask([])
    with pytest.raises(PoseError, match='increasing'): ask([mini('fwe')], lengths=(900, 500))
    with pytest.raises(PoseError, match='trials'): ask([mini('fwe')], trials=0)
    with pytest.raises(PoseError, match='too few for an answer'): ask(mini('niah_multiquery', new_tokens=5))
    with pytest.raises(PoseError, match='new_tokens'): ask(mini('fwe', new_tokens=0))
    with pytest.raises(PoseError, match='needs questions; pass file'): ask('qa_2')
    with pytest.raises(PoseError, match='only 60 units'): ask(QA(file=dev), lengths=60_000)
    with pytest.raises(PoseError, match='only .* units'): ask(mini('cwe', words=tuple(NOUNS[:70])), lengths=30_000)
    with pytest.raises(PoseError, match='threshold'): ask(mini('fwe'), threshold=85)
    with pytest.raises(PoseError, match='names or tasks'): ask(5)
    with pytest.raises(PoseError, match='names or tasks'): ask(['vt', None])
    for seed in (-1, 2**64, 1.5):
        with pytest.raises(PoseError, match='seed'): ask(mini('fwe'), seed=seed)
    with pytest.raises(PoseError, match='file is 5'): ask(QA(file=5))


@pytest.mark.parametrize('make', [lambda: Niah(haystack='grass'), lambda: Niah(haystack='Repeat'), lambda: QA(metric='MEAN'), lambda: Niah(key_type='letters'), lambda: Niah(value_type=None), lambda: Niah(keys=0), lambda: Niah(values=1.5), lambda: Niah(queries=True),
    lambda: Niah(text=' '), lambda: Niah(text=5), lambda: Niah(words=('a',)), lambda: Niah(words=('a',) * 100), lambda: Niah(words='abc' * 99), lambda: Niah(words=list(range(200))), lambda: Niah(words=5), lambda: Niah(chat='x'), lambda: Niah(chat='{task}{task}'), lambda: VariableTracking(hops=0), lambda: VariableTracking(chains=-1),
    lambda: VariableTracking(example=-5), lambda: CommonWords(common=0), lambda: CommonWords(words=('a', 'b')), lambda: CommonWords(words=('A', 'a') * 40), lambda: FrequentWords(alpha=1), lambda: FrequentWords(alpha='2'), lambda: QA(metric='median')])
def test_wrong_fields(make):
    with pytest.raises(PoseError): make()


@pytest.mark.parametrize('official', [False, True])
@pytest.mark.parametrize('name', FREE)
def test_too_short_says_what_it_takes(name, official):
    task = mini(name, official=official)
    with pytest.raises(PoseError, match='is too short') as e: prompts(task, 200, 1)
    n = int(re.search(r'this prompt takes (\d+)', str(e.value)).group(1))
    for length in (n + 60, n + 200): assert len(prompts(task, length, 1)[0].ids) <= length


def test_an_example_that_is_too_short():
    with pytest.raises(PoseError, match='example=0 for none'): prompts(mini('vt', example=100), 3000, 1)
