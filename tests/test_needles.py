import json, re
from dataclasses import replace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pose_nb.answers import Prompt, Reader, answer, follow, make_trials, retrieve, shared_start, trial_rng
from pose_nb.common import PoseError
from pose_nb.needles import (ADJECTIVES, ASK, BOOK, CITIES, FACT, GOLD, LINE, LINES, NOUNS, SANDWICH, Haystack, KeyValue, Lines, MultiNeedle, Needle, by_criterion, count_found,
                             gold_depths, hide, normalised, pairs_length)
from pose_nb.retrieval import GARBAGE
from test_retrieval import COARSE, FOREIGN, TOK, make_tokenizer

torch.set_num_threads(1)
STORY = ' '.join(f'On day {i} the old boat came home. Nobody knew where it had been, and the sea was calm!' for i in range(60))
CODE = 'def add(a, b):\n    return a + b\n\nclass Boat:\n    "A boat."\n    def sail(self, wind=3.14): return self.x * wind\n' * 9
FINE = make_tokenizer(900, corpus=[STORY, CODE, LINES, LINE * 3, ASK, BOOK, FACT], bos=False)        # few tokens: long prompts are cheap
TOKENIZERS = dict(digits=TOK, groups=COARSE, foreign=FOREIGN, fine=FINE)
HAYS = dict(garbage=Haystack(), story=Haystack(STORY), code=Haystack([CODE, STORY], sentence=True), anywhere=Haystack([STORY], anywhere=True, sentence=True))
encode = lambda tok, text: tok(text, add_special_tokens=False)['input_ids']


def make(task, tok, length, depth=.5, trial=0, bos=0, seed=0): return task.prompt(tok, length, depth, trial_rng(seed, length, trial), bos)
def least(task, tok, **kw):
    with pytest.raises(PoseError, match='at least') as e: make(task, tok, 40, **kw)
    return int(re.search(r'at least (\d+)', str(e.value))[1])


# ---- what every prompt promises -----------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=120)
@given(st.sampled_from(list(TOKENIZERS)), st.sampled_from(list(HAYS)), st.integers(1, 900), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 2**63), st.booleans(), st.integers(0, 5))
def test_needles_are_exact(tok, hay, more, depth, seed, bos, distractors):
    tok, task, bos = TOKENIZERS[tok], Needle(haystack=HAYS[hay], distractors=distractors), 0 if bos else None
    length = 900 + more
    p = make(task, tok, length, depth, seed=seed, bos=bos)
    assert len(p.ids) == length - task.new_tokens and (bos is None or p.ids[0] == 0 and 0 not in p.ids[1:])
    text, (number,), f = tok.decode(p.ids), p.references, p.facts
    told = f"\nThe special magic {f['key']} number is: {number}.\n"
    assert text.count(told) == 1 and text.count(number) == 1 and tok.decode(p.ids[f['index']:]).startswith(told) and len(number) == 7
    assert text.endswith(f"The special magic {f['key']} number is:") and tok.decode(p.ids[int(bos is not None):]).startswith(BOOK)
    facts = re.findall(r'\nThe special magic (\w+) number is: (\d+)\.\n', text)
    assert len({k for k, _ in facts}) == len({v for _, v in facts}) == len(facts) == distractors + 1
    head = len(encode(tok, BOOK)) + (bos is not None)
    before = [x for x in re.findall(r'The special magic \w+ number is: \d+\.', tok.decode(p.ids[:f['index']]))]
    assert f['index'] >= head + f['at'] and (before or f['index'] == head + f['at'])
    if depth is not None and not task.haystack.sentence: assert f['at'] == round(depth * f['text'])
    if depth is not None: assert f['at'] <= round(depth * f['text'])
    assert 0 <= f['at'] <= f['text'] and tok.decode(p.answer) == f' {number}' and json.dumps(f)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(TOKENIZERS)), st.integers(0, 900), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 2**63), st.integers(1, 6), st.sampled_from([6, 7]), st.integers(0, 3))
def test_several_needles_are_exact(tok, more, depth, seed, needles, digits, distractors):
    tok, task = TOKENIZERS[tok], MultiNeedle(haystack=HAYS['story'], needles=needles, digits=digits, distractors=distractors)
    p = make(task, tok, 1600 + more, depth, seed=seed)
    assert len(p.ids) == 1600 + more - task.new_tokens
    text, f = tok.decode(p.ids), p.facts
    assert len(set(p.references)) == needles and all(text.count(n) == 1 and len(n) == digits for n in p.references)
    for n, i in zip(p.references, f['index']): assert tok.decode(p.ids[i:]).startswith(f"\nOne of the special magic {f['key']} numbers is: {n}.\n")
    assert f['at'] == sorted(f['at']) and f['index'] == sorted(f['index']) and tok.decode(p.answer) == ' ' + ', '.join(p.references)
    size = f['text']
    if depth is None: assert all(int(i / needles * size) <= a <= int((i + 1) / needles * (size + 1)) for i, a in enumerate(f['at']))
    else: assert f['at'] == [round((depth + (1 - depth) * i / needles) * size) for i in range(needles)]
    assert len(set(re.findall(rf"special magic {f['key']} numbers is: (\d+)", text))) == needles and len(re.findall(r'numbers is: \d+', text)) == needles + distractors


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(TOKENIZERS)), st.integers(0, 900), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 2**63), st.booleans(), st.booleans(), st.sampled_from([Lines, KeyValue]))
def test_records_are_exact(tok, more, depth, seed, bos, fill, kind):
    tok, task = TOKENIZERS[tok], kind(fill=fill)
    length = 1500 + more
    p = make(task, tok, length, depth, seed=seed, bos=0 if bos else None)
    text, f = tok.decode(p.ids), p.facts
    pattern, tail = (r'line ([\w-]+): REGISTER_CONTENT is <(\d+)>\n', ' is <') if kind is Lines else (r'"([\w-]+)": "([\w-]+)"(?:,\n|\})', 'Corresponding value:')
    records = re.findall(pattern, text)
    assert len(p.ids) == length - task.new_tokens if fill else length - task.new_tokens - 200 <= len(p.ids) <= length - task.new_tokens
    assert len(records) == f['records'] >= 2 and len({k for k, _ in records}) == len({v for _, v in records}) == len(records)
    assert records[f['record']] == (f['key'], p.references[0]) and text.endswith(tail)
    assert re.search(pattern, tok.decode(p.ids[f['index']:]))[1] == f['key']
    if depth is not None: assert f['record'] == round(depth * (f['records'] - 1))
    if not fill: assert p.ids[int(bos):] == encode(tok, text.removeprefix('<s>')) and f['fill'] == 0      # the very tokens of the text
    if kind is KeyValue: assert json.loads(re.search(r'\{".*\}', text, re.S)[0])[f['key']] == p.references[0]


@pytest.mark.parametrize('tok', TOKENIZERS)
@pytest.mark.parametrize('task', [Needle(), Needle(distractors=3), MultiNeedle(), Lines(), Lines(lines=7), KeyValue(), KeyValue(pairs=4), SANDWICH], ids=lambda t: f'{t.name}')
def test_the_least_length_is_the_least(task, tok):
    tok = TOKENIZERS[tok]
    n = least(task, tok)
    same = lambda length: task.prompt(tok, length, .5, trial_rng(0, 40, 0), 0)
    assert len(same(n).ids) == n - task.new_tokens and len(same(n).answer) >= 1
    with pytest.raises(PoseError, match=f'at least {n}'): same(n - 1)


@pytest.mark.parametrize('task', [Needle(haystack=HAYS['story'], distractors=2), Needle(haystack=HAYS['anywhere']), MultiNeedle(haystack=HAYS['code']), Lines(), KeyValue()], ids=lambda t: t.name)
@pytest.mark.parametrize('tok', TOKENIZERS)
def test_depths_ask_the_same_question_and_trials_do_not_depend_on_each_other(task, tok):
    grid = make_trials(task, TOKENIZERS[tok], (1500, 1700), (0., .3, 1.), trials=3)
    for n in (1500, 1700):
        for t in range(3):
            same = [g['prompt'] for g in grid if (g['length'], g['trial']) == (n, t)]
            assert len({(p.facts['key'], *p.references) for p in same}) == 1
            assert all(sorted(p.ids) == sorted(same[0].ids) for p in same) or task.name in ('lines', 'key_value') and len({p.facts['records'] for p in same}) == 1
    assert len({g['prompt'].references[0] for g in grid}) == 6
    alone = make_trials(task, TOKENIZERS[tok], (1700,), (.3,), trials=2)
    assert [a['prompt'] for a in alone] == [g['prompt'] for g in grid if (g['length'], g['depth']) == (1700, .3)][:2]


def test_prompts_of_one_length_begin_alike():
    a, b = (make(Needle(haystack=HAYS['story']), TOK, 1000, d, t).ids for d, t in ((.6, 0), (.9, 1)))
    text = len(a) - len(encode(TOK, BOOK)) - 150
    assert shared_start(a, b) > .5 * text
    a, b = (make(Needle(haystack=HAYS['anywhere']), TOK, 1000, .9, t).ids for t in (0, 1))
    assert shared_start(a, b) < 40


# ---- haystack ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tok', TOKENIZERS)
def test_haystack(tok):
    tok, hay = TOKENIZERS[tok], Haystack([STORY, CODE])
    ids = hay.cut(tok, 500)
    assert len(ids) == 500 and (hay.text.startswith(tok.decode(ids)) or tok is FOREIGN) and hay.text == '\n\n' + STORY + '\n\n' + CODE
    whole = encode(tok, '.' + hay.text)
    assert len(hay.cut(tok, 3 * len(whole))) == 3 * len(whole) and hay.cut(tok, 3 * len(whole))[:600] == hay.cut(tok, 600)
    once = replace(hay, repeat=False, anywhere=True)
    full = len(hay.cut(tok, 1)) and next(n for n in range(len(whole) + 3, 0, -1) if _can(once, tok, n))
    assert tok.decode(once.cut(tok, full, .99)) == hay.text or tok.decode(once.cut(tok, full, .99)).strip() == hay.text.strip()
    assert {tuple(replace(hay, anywhere=True).cut(tok, 20, u)) for u in (0., .3, .6)} != {tuple(hay.cut(tok, 20))}
    assert Haystack().cut(tok, 40) == (encode(tok, '.' + f' {GARBAGE}' * 3)[1:])[:40] or tok.decode(Haystack().cut(tok, 40)).startswith(' The grass is')
    assert Haystack(STORY).protocol()['texts'] == 1 and Haystack(STORY).protocol()['sha256'] != Haystack(CODE).protocol()['sha256'] == Haystack([CODE], sentence=True).protocol()['sha256']


def _can(hay, tok, n):
    try: return bool(hay.cut(tok, n))
    except PoseError: return False


@pytest.mark.parametrize('tok', TOKENIZERS)
def test_sentence_ends_by_decoding(tok):
    tok, hay = TOKENIZERS[tok], Haystack([STORY, CODE], sentence=True)
    ids = hay.cut(tok, 900)
    for at in (5, 100, 333, 800):
        got = hay.place(tok, ids, at)
        assert got <= at and re.search(r'([.!?]["\'\)]*\s*|\n\s*)$', tok.decode(ids[:got])) and hay.place(tok, ids, got) == got
        assert not any('.' in (t := tok.decode([i])).rstrip(' )"\'')[-1:] or '\n' in t for i in ids[got:at])
    assert hay.place(tok, ids, 0) == 0 and hay.place(tok, ids, 900) == 900
    none = Haystack('no end at all ' * 99, sentence=True)
    assert none.place(tok, none.cut(tok, 50)[5:], 20) == 0


def test_special_tokens_in_texts_are_letters():
    p = make(Needle(haystack=Haystack('print("<s></s>") ends it. ' * 50)), TOK, 500)
    assert p.ids.count(0) == 1 and 1 not in p.ids and '<s></s>' in TOK.decode(p.ids)


def test_numbers_of_the_haystack_are_not_drawn():
    full = ' '.join(str(n) for n in range(10, 100) if n != 42)
    assert make(Needle(haystack=Haystack(full), digits=2), TOK, 400).references == ['42']
    with pytest.raises(PoseError, match='more digits'): make(Needle(haystack=Haystack(full + ' 42'), digits=2), TOK, 400)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.data())
def test_hide(text, data):
    pieces = data.draw(st.lists(st.lists(st.integers(100, 130), min_size=1, max_size=4), max_size=5))
    places = [data.draw(st.integers(0, len(text))) for _ in pieces]
    out, where = hide(text, pieces, places)
    assert len(out) == len(text) + sum(map(len, pieces)) and [i for i in out if i < 100] == text
    assert all(out[w:w + len(p)] == p and sum(i < 100 for i in out[:w]) == at for w, p, at in zip(where, pieces, places))


@pytest.mark.parametrize('tok', TOKENIZERS)
def test_follow_is_the_continuation(tok):
    tok = TOKENIZERS[tok]
    for before, text in (('The number is:', ' 31245'), ('>\n', 'line a-b: x'), ('.', '\nThe special magic Paris number is: 7.\n'), ('', 'abc'), ('abc', '')):
        (ids,) = follow(tok, [text], before, plain=True)
        assert tok.decode(ids) == text and (encode(tok, before) + ids == encode(tok, before + text) or ids == encode(tok, text))


# ---- readers that play by a script -------------------------------------------------------------------------------------------------

def magic(text):
    key = (re.findall(r'special magic (\w+) number is:', text) or ['?'])[-1]
    found = re.search(rf'special magic {key} number is: (\d+)', text)
    return f' {found[1]}.' if found else ' none.'
def magics(text):
    key = (re.findall(r'special magic (\w+) numbers are:', text) or ['?'])[-1]
    return ' ' + ', '.join(re.findall(rf'special magic {key} numbers is: (\d+)', text)) + '.'
def line(text):
    key = (re.findall(r'in line ([\w-]+) is <', text) or ['?'])[-1]
    found = re.search(rf'line {re.escape(key)}: REGISTER_CONTENT is <(\d+)>', text)
    return f'{found[1]}>.' if found else '0>.'
def value(text):
    key = (re.findall(r'Key: "([\w-]+)"', text) or ['?'])[-1]
    found = re.search(rf'"{re.escape(key)}": "([\w-]+)"', text)
    return f' "{found[1]}"' if found else ' ?'
ORACLES = [(Needle(haystack=HAYS['story'], distractors=4), magic, 'number is:'), (MultiNeedle(haystack=HAYS['story'], criterion='all'), magics, 'numbers are:'), (Lines(), line, ' is <'),
           (Lines(number='last'), line, ' is <'), (KeyValue(), value, 'Corresponding value:')]


@pytest.mark.parametrize('tok', ['digits', 'groups'])
@pytest.mark.parametrize('task,reply,question', ORACLES, ids=lambda x: getattr(x, 'name', ''))
def test_oracles_find_everything(task, reply, question, tok):
    tok = TOKENIZERS[tok]
    r = retrieve(Reader(tok, reply, question), tok, task, (1100, 1300), (0, .5, 1), trials=3)
    assert r.accuracy == {1100: 1., 1300: 1.} and r.reach(1) == 1300 and all(t['forced'] for t in r.trials)
    assert all((row.prompt_min, row.prompt_max) == (row.length - task.new_tokens,) * 2 for row in r.rows)
    assert json.loads(json.dumps(r.to_dict()))['rows'][0]['protocol']['task'] == task.name
    if task.name == 'needle': assert len(json.dumps(r.to_dict())) < 9000 and r.rows[0].protocol['haystack']['characters'] == len(STORY) + 2
    short = retrieve(Reader(tok, reply, question, window=500), tok, task, 1300, (0, 1), trials=3)
    assert short.rows[0].accuracy == 0 and short.rows[1].accuracy == (1 if task.name != 'multi_needle' else 0) or task.name == 'multi_needle' and short.rows[0].accuracy == 0


def test_distractors_separate_reading_from_guessing():
    first = lambda text: ' ' + (re.search(r'\d{7}', text) or ['no'])[0] + '.'
    score = lambda n: retrieve(Reader(TOK, first, 'number is:'), TOK, Needle(distractors=n), 700, trials=30).accuracy[700]
    assert score(0) == 1 and score(1) < .9 and score(6) < .45


def test_first_line_is_not_the_answer():
    first = lambda text: (re.search(r'REGISTER_CONTENT is <(\d+)', text) or [0, '0'])[1] + '>.'
    r = retrieve(Reader(TOK, first, ' is <'), TOK, Lines(), 1100, (0, .5, 1), trials=4)
    assert [row.accuracy for row in r.rows] == [1, 0, 0]


@pytest.mark.parametrize('task,reply', [(Lines(), line), (KeyValue(), value)], ids=['lines', 'key_value'])
def test_other_records_may_change_places(task, reply):
    p = make(task, TOK, 1500)
    text, rng = TOK.decode(p.ids), np.random.default_rng(0)
    pattern = r'line [\w-]+: REGISTER_CONTENT is <\d+>' if task.name == 'lines' else r'"[\w-]{36}": "[\w-]{36}"'
    records = re.findall(pattern, text); others = [r for r in records if p.facts['key'] not in r]
    shuffled = iter(rng.permutation(others).tolist())
    moved = re.sub(pattern, lambda m: m[0] if p.facts['key'] in m[0] else next(shuffled), text)
    assert moved != text and task.mark(reply(moved), p) == task.mark(reply(text), p) == 1
    wrong = re.findall(r'\d+>|[\w-]{36}"$', others[0])[-1]
    assert task.mark(wrong, p) == 0


def test_criteria_count_the_same_replies():
    said = lambda n: lambda text: ' ' + ' and '.join((re.findall(r'numbers is: (\d+)', text) + ['7'])[:n]) + '.'
    for n, want in ((0, (0, 0, 0, 0)), (1, (1, 0, 0, .25)), (2, (1, 1, 0, .5)), (4, (1, 1, 1, 1))):
        r = retrieve(Reader(TOK, said(n), 'numbers are:'), TOK, MultiNeedle(), 900, trials=2)
        rows = by_criterion(r)
        assert [x['score'] for x in rows] == list(want) and r.accuracy[900] == want[3] and [x['criterion'] for x in rows] == ['any', 'two', 'all', 'mean']
        for c, w in zip(('any', 'two', 'all', 'mean'), want):
            assert retrieve(Reader(TOK, said(n), 'numbers are:'), TOK, MultiNeedle(criterion=c), 900, trials=2).accuracy[900] == w


# ---- marks -------------------------------------------------------------------------------------------------------------------------

def q(*refs): return Prompt([0], [0], list(refs), {})

@pytest.mark.parametrize('reply,mark,finished', [(' 1234567', 1, False), (' 1234567.', 1, True), (' 12345678', 0, False), (' 1,234,567', 0, True), (' 7 or 1234567', 0, True), ('', 0, False),
                                                 (' the number 01234567\n', 1, True), (' words', 0, False)])
def test_needle_marks(reply, mark, finished): assert (Needle().mark(reply, q('1234567')), Needle().finished(reply, q('1234567'))) == (mark, finished)


@pytest.mark.parametrize('criterion,reply,mark,finished', [
    ('any', ' 11', 1, False), ('any', ' 11,', 1, True), ('two', ' 11, 22', 1, False), ('two', ' 11, 22 ', 1, True), ('two', ' 11, 11,', 0, False), ('all', ' 22 11 44 33.', 1, True),
    ('all', ' 22 11 44', 0, False), ('mean', ' 22 11 9', .5, False), ('mean', ' 2211', 0, False), ('mean', ' 11 22 33 44', 1, False)])
def test_several_needles_marks(criterion, reply, mark, finished):
    task = MultiNeedle(criterion=criterion, digits=2)
    assert (task.mark(reply, q('11', '22', '33', '44')), task.finished(reply, q('11', '22', '33', '44'))) == (mark, finished)


@pytest.mark.parametrize('reply,first,last,finished', [('31245>', 1, 1, True), ('31245', 1, 1, False), ('<31245> in line 4', 1, 0, True), ('line 4: 31245', 0, 1, True), ('no', 0, 0, False), ('031245.', 1, 1, True)])
def test_line_marks(reply, first, last, finished):
    assert [Lines(number=n).mark(reply, q('31245')) for n in ('first', 'last')] == [first, last]
    assert Lines().finished(reply, q('31245')) == finished and not Lines(number='last').finished(reply, q('31245'))


def test_value_marks():
    code = '0b1b2c3d-aaaa-4bbb-8ccc-0123456789ab'
    assert normalised('The  "A-B" an\n C!') == 'ab c' and normalised(code) == code.replace('-', '')
    for reply, mark in ((code, 1), (code.upper(), 1), (f'The value is "{code}".', 1), (code.replace('-', ''), 1), (code[:-1], 0), (code[::-1], 0), ('', 0), (code.replace('-', ' '), 0)): assert KeyValue().mark(reply, q(code)) == mark


@settings(deadline=None)
@given(st.sampled_from([Needle(), MultiNeedle(), MultiNeedle(criterion='any'), MultiNeedle(criterion='two'), Lines(), KeyValue(), SANDWICH]), st.text('12 3,.\neatsandwich', max_size=30), st.text('12 3,.\nabc', max_size=12))
def test_finished_replies_keep_their_mark(task, reply, more):
    p = q('12', '3', '123', '31') if task.name == 'multi_needle' else q('12')
    if task.finished(reply, p): assert task.mark(reply + more, p) == task.mark(reply, p)


def test_the_sandwich():
    p = make(replace(SANDWICH, haystack=HAYS['story']), TOK, 700, 0.)
    text = TOK.decode(p.ids)
    assert text.count('eat a sandwich and sit in Dolores Park on a sunny day.') == 1 and text.endswith('The best thing to do in San Francisco is') and TOK.decode(p.answer) == ' eat a sandwich and sit in Dolores Park'
    assert SANDWICH.mark(' to EAT a\nsandwich and sit in Dolores  Park', p) == 1 and SANDWICH.mark(' eat a burger', p) == 0
    assert retrieve(Reader(TOK, lambda t: ' eat a sandwich and sit in Dolores Park.', 'San Francisco is'), TOK, replace(SANDWICH, haystack=HAYS['story']), 700, trials=2).accuracy == {700: 1.}
    with pytest.raises(PoseError, match='itself has'): make(replace(SANDWICH, haystack=Haystack(STORY + ' We eat a sandwich and sit in Dolores Park.')), TOK, 700)


# ---- strings, words, lengths --------------------------------------------------------------------------------------------------------

def test_strings_are_the_protocol():
    assert FACT == '\nThe special magic {key} number is: {value}.\n' and BOOK == 'This is a very long story book: <book>'
    assert LINES.startswith("Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end") and LINES.endswith('Now the record start:\n\n')
    p = make(Lines(fill=False, prefix=''), TOK, 1500)
    assert TOK.decode(p.ids).endswith(f">\n\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {p.facts['key']}? I need the number.") and TOK.decode(p.answer) == ' ' + p.references[0]
    p = make(KeyValue(fill=False, pairs=2), TOK, 900, 0., bos=None)
    (a, b), (c, d) = re.findall(r'"([\w-]{36})": "([\w-]{36})"', TOK.decode(p.ids))
    assert TOK.decode(p.ids) == f'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{{"{a}": "{b}",\n "{c}": "{d}"}}\n\nKey: "{a}"\nCorresponding value:'
    assert p.references == [b] and re.fullmatch(r'[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}', b)


def test_words():
    for words in (ADJECTIVES, NOUNS, [c.lower() for c in CITIES]): assert len(set(words)) == len(words) >= 60 and all(w.isascii() and w.isalpha() and w.islower() for w in words)
    assert len(ADJECTIVES) * len(NOUNS) > 20_000


def test_gold_places():
    for pairs, places in GOLD.items():
        assert [round(d * (pairs - 1)) for d in gold_depths(pairs)] == list(places) and gold_depths(pairs)[0] == 0 and gold_depths(pairs)[-1] == 1
    n = pairs_length(TOK, 75)
    grid = make_trials(KeyValue(pairs=75), TOK, (n,), gold_depths(75), trials=1)
    assert [g['prompt'].facts['record'] for g in grid] == list(GOLD[75]) and {g['prompt'].facts['records'] for g in grid} == {75}


@pytest.mark.parametrize('tok', TOKENIZERS)
@pytest.mark.parametrize('pairs', [2, 10, 75])
def test_pairs_length_is_enough_and_not_much_more(tok, pairs):
    n = pairs_length(TOKENIZERS[tok], pairs)
    fills = [make(KeyValue(pairs=pairs), TOKENIZERS[tok], n, trial=t).facts['fill'] for t in range(12)]
    assert 0 <= min(fills) and max(fills) < 60 + .05 * n


def test_as_many_lines_as_fit():
    p = make(Lines(fill=False), FINE, 3000)
    more = re.findall(r'line [\w-]+: REGISTER_CONTENT is <\d+>\n', FINE.decode(p.ids))
    assert 3000 - 35 - len(p.ids) < max(len(encode(FINE, m)) for m in more) + 4 and p.facts['records'] == len(more) > 50


# ---- real models --------------------------------------------------------------------------------------------------------------------

SIZE = dict(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
            pad_token_id=None, initializer_range=.2)
MODELS = [(LlamaForCausalLM, LlamaConfig, {}), (MistralForCausalLM, MistralConfig, dict(sliding_window=32)), (Gemma2ForCausalLM, Gemma2Config, dict(sliding_window=32, query_pre_attn_scalar=16))]


@pytest.mark.parametrize('task', [Needle(new_tokens=10, distractors=1), Lines(new_tokens=12), MultiNeedle(new_tokens=40, needles=2), KeyValue(new_tokens=40)], ids=lambda t: t.name)
@pytest.mark.parametrize('cls,config,kw', MODELS, ids=['llama', 'mistral', 'gemma2'])
def test_equal_to_the_slow_way(cls, config, kw, task):
    torch.manual_seed(0)
    m = cls(config(**SIZE, **kw)).eval()
    prompts = [t['prompt'] for t in make_trials(task, TOK, (760,), (0., 1.), trials=2, bos=0)]
    got = {c: answer(m, TOK, task, prompts, batch_tokens=b, chunk=c) for b, c in ((1, 100), (4000, 2048))}
    for i, p in enumerate(prompts):
        x = torch.tensor([p.ids])
        with torch.inference_mode():
            want = -m(torch.tensor([p.ids + p.answer])).logits[0, len(p.ids) - 1:-1].float().log_softmax(-1).gather(-1, torch.tensor(p.answer)[:, None]).mean().item()
            while x.shape[1] < len(p.ids) + task.new_tokens:
                x = torch.cat([x, m(x).logits[:, -1:].argmax(-1)], 1)
                reply = TOK.decode(x[0, len(p.ids):].tolist(), skip_special_tokens=True)
                if x[0, -1] == TOK.eos_token_id or task.finished(reply, p): break
        for g in got.values():
            assert g[i]['nll'] == pytest.approx(want, abs=2e-4) and g[i]['reply'] == reply and g[i]['mark'] == task.mark(reply, p)


# ---- requests that cannot be met ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f,says', [
    (lambda: Haystack(['a', '  ']), 'not empty'), (lambda: Haystack([3]), 'strings'), (lambda: Needle(distractors=-1), 'distractors'), (lambda: Needle(distractors=60), 'names for 59'),
    (lambda: Needle(distractors=1.5), 'distractors'), (lambda: Needle(digits=0), 'digits'), (lambda: Needle(digits=19), '1 to 18'), (lambda: Needle(fact='no'), '{value}'),
    (lambda: Needle(fact='{value}', distractors=1), '{key}'), (lambda: replace(SANDWICH, distractors=2), '{key}'), (lambda: Needle(digits=1, distractors=9), 'too few numbers'),
    (lambda: MultiNeedle(needles=0), 'needles'), (lambda: MultiNeedle(needles=1, criterion='two'), 'at least 2'), (lambda: MultiNeedle(criterion='some'), 'any, two, all, mean'),
    (lambda: MultiNeedle(value='x'), 'leave value out'), (lambda: Lines(number='middle'), 'first, last'), (lambda: Lines(lines=1), 'lines is 1'), (lambda: Lines(lines=10**6), 'lines is 1000000'),
    (lambda: KeyValue(pairs=1), 'at least 2'), (lambda: KeyValue(pairs=2.5), 'pairs'), (lambda: gold_depths(76), 'choose one of: 75, 140'), (lambda: make(Needle(), TOK, 60), 'at least'),
    (lambda: pairs_length(TOK, 1), 'at least 2'),
    (lambda: make(Needle(haystack=Haystack('The special magic ' + ' The special magic '.join(f'{c} number is: 1.' for c in CITIES))), TOK, 700), 'itself has'),
    (lambda: make(Needle(haystack=Haystack(STORY, repeat=False)), TOK, 9000), 'begin again'), (lambda: make_trials(Needle(new_tokens=3), TOK, (700,)), 'at least 8'),
    (lambda: make(Lines(lines=400), TOK, 700), 'at least'), (lambda: make(KeyValue(pairs=40), TOK, 700), 'at least')])
def test_bad_requests_are_one_sentence(f, says):
    with pytest.raises(PoseError, match=re.escape(says)) as e: f()
    assert str(e.value).count('. ') == 0 and str(e.value).endswith('.')


def test_replies_that_were_cut_short_are_not_counted_again():
    r = retrieve(Reader(TOK, magics, 'numbers are:'), TOK, MultiNeedle(criterion='any'), 900, trials=1)
    with pytest.raises(PoseError, match='complete'): by_criterion(r)


# ---- other families of tokenizers ----------------------------------------------------------------------------------------------------

def llama2_like():
    "Spaces become a sign in front of a word, the text gets one in front, line breaks are bytes."
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    corpus = [w for w in re.findall(r' ?[^\s]+', ' '.join([STORY, LINES, LINE, ASK, BOOK, FACT, GARBAGE, 'value corresponding JSON Key 0123456789abcdef-']))]
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=['<s>', '</s>', '<unk>'] + [f'<0x{i:02X}>' for i in range(256)], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>', unk_token='<unk>')

def gpt4_like():
    "Punctuation takes the line breaks behind it; digits come in groups of three."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    corpus = [STORY, CODE, LINES, LINE * 5 + '\nNow the record', ASK, BOOK, FACT * 3, '.\n.\n\n>\n>\n\n:\n\n",\n"}\n\n' * 9]
    tok.train_from_iterator(corpus * 3, trainers.BpeTrainer(vocab_size=900, special_tokens=['<s>', '</s>'], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>')


@pytest.mark.parametrize('make_tok', [llama2_like, gpt4_like])
def test_other_families(make_tok):
    tok = make_tok()
    for t in range(8):
        for depth in (0., .4, 1., None):
            for task in (Needle(haystack=HAYS['code'], distractors=2), Needle(haystack=HAYS['story']), MultiNeedle(haystack=HAYS['story']), Lines(), KeyValue()):
                p = make(task, tok, 1600 + t, depth, t)
                text = tok.decode(p.ids)
                assert len(p.ids) == 1600 + t - task.new_tokens and all(r in text for r in p.references) and p.facts['key'] in text
                if task.name == 'needle': assert len(re.findall(rf"special magic {p.facts['key']} number is: {p.references[0]}\.\n", text)) == 1
                assert p.answer[-1] != tok.unk_token_id and task.mark(tok.decode(p.answer), p) == 1
            for task in (Lines(fill=False), KeyValue(fill=False), Lines(fill=False, lines=2), KeyValue(fill=False, pairs=2)):
                p = make(task, tok, 1600 + t, depth, t, bos=None)
                text = tok.decode(p.ids)
                assert p.ids == encode(tok, text) and p.ids + p.answer == encode(tok, tok.decode(p.ids + p.answer))
