import json, re

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pose_nb.retrieval as retrieval
from pose_nb.common import PoseError
from pose_nb.answers import Reader, depth_plot, make_trials, trial_rng, wilson
from pose_nb.retrieval import GARBAGE, INFO, PIECES, QUESTION, TASK, Passkey, answer_tokens, draw_key, first_number, passkey, passkey_prompt, passkey_text

torch.set_num_threads(1)


def make_tokenizer(vocab=400, split=True, corpus=None, bos=True):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=split), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    corpus = corpus or [passkey_text(k, GARBAGE, GARBAGE) for k in range(1, 50_000, 997)]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<s>', '</s>'], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='</s>', **({'bos_token': '<s>'} if bos else {}))


TOK = make_tokenizer()
COARSE = make_tokenizer(600, split=False)                                  # digits in groups
FOREIGN = make_tokenizer(300, corpus=['ein ganz anderer Text mit anderen Worten'] * 9)   # nearly bytes: pieces of many tokens
SMALL = dict(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=.2)


def model(cls=LlamaForCausalLM, config=LlamaConfig, **kw):
    torch.manual_seed(0)
    return cls(config(**{**SMALL, **kw})).eval()


def test_strings_are_the_protocol():
    assert TASK.startswith('There is an important info hidden inside a lot of irrelevant text. Find it and memorize them.') and TASK.endswith('the important information there.')
    assert GARBAGE == 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
    assert INFO.format(k=7) == 'The pass key is 7. Remember it. 7 is the pass key.' and QUESTION == 'What is the pass key? The pass key is'
    assert passkey_text(5, 'a', 'b').split('\n') == [TASK, 'a', INFO.format(k=5), 'b', QUESTION] and ''.join(PIECES) == GARBAGE


@settings(deadline=None, max_examples=60)
@given(st.integers(80, 700), st.integers(1, 50_000), st.floats(0, 1), st.booleans(), st.booleans())
def test_prompts_fit_exactly(tokens, key, depth, uniform, bos):
    p = passkey_prompt(TOK, tokens, key, min(depth, .999) if uniform else depth, 0 if bos else None, uniform)
    assert len(p.ids) == tokens                                             # one token per piece: always exact
    assert p.ids == ([0] if bos else []) + TOK(p.text, add_special_tokens=False)['input_ids']
    assert re.findall(r'\d+', p.text) == [str(key)] * 2 and p.text.endswith(QUESTION) and p.text.startswith(TASK)
    lines = p.text.split('\n')
    assert len(lines) == 5 and lines[1] == GARBAGE * p.before and 0 <= p.before <= p.units
    assert (GARBAGE * (p.units - p.before + 1)).startswith(lines[3])
    if not uniform: assert p.before == round(depth * p.units)


@pytest.mark.parametrize('tok', [COARSE, FOREIGN])
@pytest.mark.parametrize('depth', [0, .3, 1])
def test_prompts_never_overflow_and_are_the_longest(tok, depth):
    for tokens in range(400, 430):
        p = passkey_prompt(tok, tokens, 31_245, depth)
        units, extra = p.units, p.text.split('\n')[3][len(GARBAGE) * (p.units - p.before):]
        pieces = units * len(PIECES) + next(i for i in range(len(PIECES)) if ''.join(PIECES[:i]) == extra)
        _, _, before, after = retrieval._garbage(pieces + 1, depth, False)
        assert len(p.ids) <= tokens < len(tok(passkey_text(31_245, before, after))['input_ids'])


def test_uniform_depth_gives_every_count():
    n = [passkey_prompt(TOK, 250, 31_245, (i + .5) / 400, uniform=True) for i in range(400)]
    counts = np.bincount([p.before for p in n])
    assert len(counts) == n[0].units + 1 and counts.min() >= counts.max() - 2


def test_trials_are_independent_of_each_other():
    a = make_trials(Passkey(), TOK, (200, 300), trials=4, bos=0)
    b = make_trials(Passkey(), TOK, (300,), trials=2, bos=0)
    assert [t['prompt'] for t in a if t['length'] == 300][:2] == [t['prompt'] for t in b]
    assert a[0]['prompt'] != make_trials(Passkey(), TOK, (200,), trials=1, seed=1, bos=0)[0]['prompt']
    grid = make_trials(Passkey(), TOK, (200,), depths=(0., 1.), trials=3)
    assert [t['prompt'].facts['key'] for t in grid[:3]] == [t['prompt'].facts['key'] for t in grid[3:]]
    assert {(t['depth'], t['prompt'].facts['before'] == 0) for t in grid} == {(0., True), (1., False)}


def test_keys():
    keys = [draw_key(trial_rng(0, 100, t)) for t in range(4000)]
    assert min(keys) >= 1 and max(keys) <= 50_000 and .17 < np.mean([k < 10_000 for k in keys]) < .23
    five = [draw_key(trial_rng(0, 100, t), 5) for t in range(2000)]
    assert min(five) >= 10_000 and max(five) < 100_000 and max(five) > 90_000
    assert {draw_key(trial_rng(0, 1, t), 1) for t in range(200)} == set(range(1, 10))


@pytest.mark.parametrize('reply,want', [(' 123.', 123), ('01234', 1234), ('a1b2', 1), ('none', None), ('', None), (' 1,234', 1)])
def test_first_number(reply, want): assert first_number(reply) == want


@pytest.mark.parametrize('tok', [TOK, COARSE, FOREIGN])
def test_answer_tokens_are_the_continuation(tok):
    for key in (3, 42, 31_245, 50_000):
        p = passkey_prompt(tok, 420, key)
        assert p.ids + answer_tokens(tok, key) == tok(p.text + f' {key}', add_special_tokens=False)['input_ids']


ORACLE = lambda text: ' ' + re.search(r'pass key is (\d+)', text).group(1) + '. Remember'
@pytest.mark.parametrize('answer,accuracy', [(ORACLE, 1.), (lambda t: ' 42', 0.), (lambda t: ' 0' + ORACLE(t).strip(), 1.), (lambda t: ' 5 or' + ORACLE(t), 0.),
                                            (lambda t: ORACLE(t).split('.')[0] + '7', 0.), (lambda t: 'the key', 0.), (lambda t: '', 0.)])
def test_scripted_readers(answer, accuracy):
    r = passkey(Reader(TOK, answer, QUESTION), TOK, (120, 200), trials=7, batch_tokens=500)
    assert r.accuracy == {120: accuracy, 200: accuracy} and r.reach() == (200 if accuracy else 0)
    for row in r.rows:
        assert row.correct == 7 * accuracy and len(row.wrong) == (0 if accuracy else 3) and row.interval == wilson(row.correct, 7)
        assert (row.prompt_min, row.prompt_max) == (row.length - 10,) * 2
    assert json.loads(json.dumps(r.to_dict()))['rows'][0]['trials'] == 7


def test_what_follows_the_end_token_does_not_count():
    assert passkey(Reader(TOK, lambda t: '</s>' + ORACLE(t), QUESTION), TOK, 120, trials=3).accuracy == {120: 0.}


@pytest.mark.parametrize('tok', [TOK, FOREIGN])
def test_batches_change_nothing(tok):
    a, b = (passkey(model(), tok, (360, 440), depths=(0, .5), trials=3, batch_tokens=n, chunk=c) for n, c in ((9999, 2048), (1, 50)))
    for x, y in zip(a.trials, b.trials):
        assert {k: v for k, v in x.items() if k not in ('nll', 'probability')} == {k: v for k, v in y.items() if k not in ('nll', 'probability')} and x['nll'] == pytest.approx(y['nll'], abs=1e-4)
    assert len(a.rows) == 4 and all(r.prompt_max <= r.length - 10 for r in a.rows)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))])
def test_devices_and_modes(device):
    m = model().to(device, torch.bfloat16).train()
    r = passkey(m, TOK, 150, trials=2)
    assert m.training and r.rows[0].bos == 0 and np.isfinite(r.rows[0].nll)


def test_bos_rules():
    none = make_tokenizer(bos=False)
    assert passkey(model(), none, 150, trials=1).rows[0].bos is None and passkey(model(), TOK, 150, trials=1, bos=False).rows[0].bos is None
    assert passkey(model(), none, 150, trials=1, bos=0).trials[0]['tokens'] == 140
    with pytest.raises(PoseError, match='no BOS'): passkey(model(), none, 150, bos=True)


@pytest.mark.parametrize('kw,says', [
    (dict(lengths=60), 'at least 7'), (dict(lengths=(300, 200)), 'increasing'), (dict(lengths=()), 'empty'), (dict(lengths=200.5), 'whole'), (dict(depths=(0, 2)), 'depths'),
    (dict(depths=(1, 0)), 'depths'), (dict(depths=()), 'depths'), (dict(depths='middle'), 'depths'), (dict(trials=0), 'trials'), (dict(trials=1.5), 'trials'), (dict(seed=-1), 'seed'),
    (dict(seed=2**64), 'seed'), (dict(digits=0), 'digits'), (dict(digits=10), 'digits'), (dict(new_tokens=0), 'new_tokens'), (dict(new_tokens=3), 'at least 6'), (dict(chunk=0), 'chunk'),
    (dict(batch_tokens=0), 'batch_tokens'), (dict(bos=999), 'knows 0 to 599')])
def test_bad_requests_are_one_sentence(kw, says):
    with pytest.raises(PoseError, match=says): passkey(model(), TOK, **{**dict(lengths=200, trials=2), **kw})


def test_other_bad_requests():
    with pytest.raises(PoseError, match='tokenizer of this model'): passkey(model(vocab_size=300), TOK, 200, trials=1)
    with pytest.raises(PoseError, match='uniform depths'): depth_plot(passkey(model(), TOK, 200, trials=1))
    with pytest.raises(PoseError, match='fixed parts take'): passkey_prompt(TOK, 20, 5)
    broken = model(); broken.lm_head.weight.data[:] = float('nan')
    with pytest.raises(PoseError, match='not finite'): passkey(broken, TOK, 200, trials=1)
