"One command extends a model; what it leaves behind is the same model for everyone."
import contextlib, io, json, subprocess, sys

import pytest, torch
from conftest import TARGET, WINDOW, command, extend_args

from pose_nb.data import read_documents
from pose_nb.model import load_model, load_tokenizer, rope_info
from pose_nb.workflow import extend

KINDS = ('llama', 'mistral', 'qwen2')
STOCK = """
import sys, torch, transformers
m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(n.startswith('pose_nb') for n in sys.modules)
n = m.config.max_position_embeddings
pos = torch.arange(n - 48, n)[None]
with torch.no_grad(): logits = m(torch.arange(48)[None], position_ids=pos, attention_mask=torch.ones_like(pos)).logits
torch.save(dict(logits=logits, ids=t('the sea sings: 123').input_ids, length=n, model_max_length=t.model_max_length), sys.argv[2])
"""


def only_json(text):
    "The one JSON object that stdout must be."
    obj, end = json.JSONDecoder().raw_decode(text)
    assert not text[end:].strip(), 'something besides the JSON was printed'
    return obj


@pytest.fixture(scope='module')
def results(checkpoint, corpus, tmp_path_factory):
    "kind -> (folder, record, base). Llama is extended by the installed command; a second and third start of Python would only test Python."
    from pose_nb.cli import main
    made = {}
    def get(kind):
        if kind in made: return made[kind]
        base, out = checkpoint(kind, bos=kind != 'qwen2'), tmp_path_factory.mktemp('out')/'result'
        words = extend_args(base, corpus.jsonl, out, json=True)
        if kind == 'llama':
            r = subprocess.run(command(*words), capture_output=True, text=True)
            assert r.returncode == 0, r.stderr
            code, printed = r.returncode, r.stdout
        else:
            with contextlib.redirect_stdout(io.StringIO()) as f: code = main(words)
            printed = f.getvalue()
        assert code == 0
        made[kind] = out, only_json(printed), base
        return made[kind]
    return get


@pytest.mark.parametrize('kind', KINDS)
def test_result_is_a_checkpoint_for_stock_transformers(kind, results, tmp_path):
    out, record, base = results(kind)
    subprocess.run([sys.executable, '-c', STOCK, str(out), str(tmp_path/'x.pt')], check=True) if kind == 'llama' else exec_stock(out, tmp_path/'x.pt')
    stock = torch.load(tmp_path/'x.pt')
    assert stock['length'] == stock['model_max_length'] == TARGET
    assert stock['ids'] == load_tokenizer(base)('the sea sings: 123').input_ids
    model = load_model(out, device='cpu')
    pos = torch.arange(TARGET - 48, TARGET)[None]
    with torch.no_grad(): assert torch.equal(stock['logits'], model(torch.arange(48)[None], position_ids=pos, attention_mask=torch.ones_like(pos)).logits)


def exec_stock(out, to):
    "What STOCK does, in this process: a start of Python is spent on one architecture only."
    import transformers
    m, t = transformers.AutoModelForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
    pos = torch.arange(TARGET - 48, TARGET)[None]
    with torch.no_grad(): logits = m(torch.arange(48)[None], position_ids=pos, attention_mask=torch.ones_like(pos)).logits
    torch.save(dict(logits=logits, ids=t('the sea sings: 123').input_ids, length=m.config.max_position_embeddings, model_max_length=t.model_max_length), to)


@pytest.mark.parametrize('kind', KINDS)
def test_vocabulary_and_config_survive(kind, results, corpus):
    out, record, base = results(kind)
    config, old = (json.loads((d/'config.json').read_text()) for d in (out, base))
    assert type(config['max_position_embeddings']) is int and config['max_position_embeddings'] == TARGET
    assert config['rope_parameters']['rope_type'] == 'yarn' and config['rope_parameters']['factor'] == TARGET / WINDOW
    assert config['vocab_size'] == old['vocab_size'] and config.get('use_cache', True)
    a, b = load_tokenizer(base), load_tokenizer(out)
    assert a.get_vocab() == b.get_vocab() and a.special_tokens_map == b.special_tokens_map
    for t in (*corpus.texts[:3], 'naïve 你好\n\t 42'): assert a(t).input_ids == b(t).input_ids
    x, y = (load_model(d, device='cpu') for d in (base, out))
    assert {n: p.shape for n, p in x.named_parameters()} == {n: p.shape for n, p in y.named_parameters()}
    assert any(not torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters())), 'three steps change something'


@pytest.mark.parametrize('kind', KINDS)
def test_record_and_card_say_how_it_was_made(kind, results):
    out, printed, base = results(kind)
    record = json.loads((out/'pose_nb.json').read_text())
    assert record == printed and record['status'] == 'done'
    assert record['plan']['target'] == TARGET and record['plan']['window'] == WINDOW and record['plan']['sampler'] == 'pose'
    assert record['settings']['max_steps'] == 3 and record['settings']['seed'] == 0
    assert record['data']['used'] + record['data']['short'] == record['data']['documents'] == 40
    assert record['result']['peak_gib'] > 0 and record['result']['tokens'] == 3 * WINDOW and record['result']['steps'] == 3
    assert {'torch', 'transformers', 'pose_nb', 'hardware'} <= set(record['environment'])
    card = (out/'README.md').read_text()
    assert f'{WINDOW} to {TARGET}' in card and 'Not evaluated' in card and card.startswith('---\n')
    assert not [p.name for p in out.iterdir() if p.name.startswith('.')], 'no temporary files stay behind'


SAMPLERS = [('pose', dict(content=c, first_chunk=f, chunks=k)) for c in ('uniform', 'contiguous', 'aligned') for f, k in (('paper', 2), ('paper', 3), ('code', 2))] + \
           [('contiguous', {}), ('full', {}), ('randpos', {}), ('cream', {}), ('cream', dict(sampler_kwargs=dict(sigma=1., gaussian='truncated'))), ('pose_early', {}),
            ('pose_even', {}), ('pose_even', dict(sampler_kwargs=dict(cut='paper', content='aligned'))), ('e2llm', dict(scaling='linear')), ('e2llm', dict(scaling='linear', sampler_kwargs=dict(max_scale=9))),
            ('turns', dict(sampler_kwargs=dict(split_ids='Ġwind'))), ('longrecipe', dict(sampler_kwargs=dict(split_ids=['Ġwind', 'Ġthe']))), ('longrecipe', dict(sampler_kwargs=dict(split_ids=['Ġwind'], drop=.5, keep_ids=[40])))]

@pytest.mark.parametrize('sampler,options', SAMPLERS, ids=lambda x: x if isinstance(x, str) else '-'.join(map(str, x.values())))
def test_every_sampler_trains(sampler, options, checkpoint, corpus, tmp_path):
    r = extend(checkpoint(), TARGET, corpus.jsonl, tmp_path/'o', sampler=sampler, max_steps=1, progress=False, **options)
    assert r['status'] == 'done' and r['result']['tokens'] == (TARGET if sampler == 'full' else WINDOW)


@pytest.mark.parametrize('words,says', [
    (['--sampler', 'turns'], "has no split_ids; name at least one"), (['--sampler', 'turns', '--sampler-kwargs', '{"split_ids": ["<|im_start|>"]}'], "this tokenizer has no token '<|im_start|>'"),
    (['--sampler', 'turns', '--sampler-kwargs', '{"split_ids": [44]}'], 'contains a split token'), (['--sampler', 'longrecipe'], 'contains a split token'),
    (['--sampler', 'turns', '--sampler-kwargs', '{"split_ids": ["Ġwind"]}', '--window', '256', '--target', '512', '--passkey-share', '.5'], 'occurs in a document of'),
    (['--sampler', 'cream', '--chunks', '3'], 'chunks belongs to the sampler pose'), (['--sampler', 'cream', '--sampler-kwargs', '{"sigma": 0}'], 'sigma is 0'),
    (['--sampler', 'cream', '--target', '200'], 'not a whole multiple'), (['--sampler', 'cream', '--target', '512'], 'do not leave a middle'), (['--sampler', 'e2llm', '--window', '128'], 'longer than the original one'),
    (['--sampler', 'pose_even', '--content', 'aligned'], 'content belongs to the sampler pose'), (['--sampler', 'pose_even', '--sampler-kwargs', '{"cut": "third"}'], "unknown cut rule 'third'")])
def test_samplers_refuse_in_one_sentence(words, says, checkpoint, corpus, cli, tmp_path):
    options = {} if '--target' in words else dict(target=TARGET)
    argv = extend_args(checkpoint(), corpus.jsonl, tmp_path/'o', **dict(target=None) | options) + words
    r = cli(*argv)
    assert r.code == 2 and says in r.err and r.err.count('pose_nb:') == 1 and 'Traceback' not in r.err and not (tmp_path/'o').exists(), r.err


@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'gz', 'parquet', 'folder'])
def test_every_data_format_gives_its_documents(kind, checkpoint, corpus, tmp_path):
    source = getattr(corpus, kind)
    want = dict(txt=['\n'.join(corpus.texts)], folder=sorted(corpus.texts[:6])).get(kind, corpus.texts)
    got = list(read_documents(source))
    assert (sorted(got) if kind == 'folder' else got) == want
    assert extend(checkpoint(), TARGET, source, tmp_path/'o', max_steps=1, progress=False)['data']['documents'] == len(want)


def test_eval_commands_print_one_json_object(results, corpus, cli):
    out, _, base = results('llama')
    r = cli('eval', 'ppl', out, '--data', corpus.jsonl, '--lengths', '64,128', '--documents', '3', '--max-tokens', '256', '--compare', base, '--json')
    rows = only_json(r.out)['rows']
    assert r.code == 0 and [(x['model'], x['length']) for x in rows] == [(n, l) for n in ('result', 'base') for l in (64, 128)]
    r = cli('eval', 'passkey', out, '--lengths', '256', '--trials', '2', '--compare', base, '--json')
    assert r.code == 0 and [x['model'] for x in only_json(r.out)['rows']] == ['result', 'base']
    card = (out/'README.md').read_text()
    assert '### Perplexity' in card and '### Passkey' in card and (out/'eval'/'ppl.svg').exists()


def test_coverage_command_prints_one_json_object(cli, tmp_path):
    r = cli('coverage', '--window', '64', '--target', '256', '--plot', tmp_path/'c.svg', '--json')
    assert r.code == 0 and only_json(r.out)['target'] == 256 and (tmp_path/'c.svg').exists()


SCHEMES = dict(none=[], linear=[], ntk=['--factor', '6'], ntk_by_parts=[], yarn=['--scaling-kwargs', '{"beta_fast": 16}'], yarn_revised=[], llama3=[], dynamic=[], abf=['--scaling-kwargs', '{"rope_theta": 40000}'],
               longrope=['--scaling-kwargs', json.dumps(dict(long_factor=[1. + i / 3 for i in range(8)], short_factor=[1.] * 8))])


@pytest.mark.parametrize('name', SCHEMES)
def test_every_scaling_extends(name, checkpoint, corpus, cli, tmp_path):
    "What is saved is what was asked for, also where training held the frequencies of the full length."
    out = tmp_path/'out'
    r = cli(*extend_args(checkpoint(), corpus.jsonl, out, scaling=name), *SCHEMES[name])
    assert r.code == 0, r.err
    info, rope = rope_info(load_model(out, device='cpu')), json.loads((out/'config.json').read_text())['rope_parameters']
    assert (info.original, info.length) == (WINDOW, TARGET) and info.scaling.name == name
    assert rope['rope_type'] == dict(none='default', ntk='default', abf='default', ntk_by_parts='longrope', yarn_revised='longrope').get(name, name)
    exec_stock(out, tmp_path/'x.pt') if name != 'dynamic' else None       # the probe looks at max_position_embeddings, where dynamic keeps the original
    if name == 'ntk': assert info.scaling.factor == 6
    if name == 'yarn': assert info.scaling.beta_fast == 16
    if name == 'longrope': assert info.scaling.short_factor == (1.,) * 8


@pytest.mark.parametrize('scaling', ['linear', 'ntk', 'yarn'])
@pytest.mark.parametrize('kind', ['gptj', 'codegen'])
def test_models_that_hide_their_rotation_extend_as_phi(kind, scaling, checkpoint, corpus, cli, tmp_path):
    base, out = checkpoint(kind), tmp_path/'out'
    r = cli(*extend_args(base, corpus.jsonl, out, scaling=scaling, sampler='pose'))
    assert r.code == 0, r.err
    exec_stock(out, tmp_path/'x.pt')
    stock, config = torch.load(tmp_path/'x.pt'), json.loads((out/'config.json').read_text())
    assert config['model_type'] == 'phi' and stock['length'] == TARGET and rope_info(load_model(out, device='cpu')).dim == 8
    pos = torch.arange(TARGET - 48, TARGET)[None]
    with torch.no_grad(): ours = load_model(out, device='cpu')(torch.arange(48)[None], position_ids=pos, attention_mask=torch.ones_like(pos)).logits
    assert torch.equal(ours, stock['logits'])


def test_extending_again_starts_from_the_original_length_and_says_so(checkpoint, corpus, cli, tmp_path):
    first, second = tmp_path/'first', tmp_path/'second'
    assert cli(*extend_args(checkpoint(), corpus.jsonl, first)).code == 0
    r = cli(*extend_args(first, corpus.jsonl, second, target=2 * TARGET))
    assert r.code == 0 and 'extended before, by yarn with factor 4; the new factor 8 is relative to its original 64 tokens' in r.err
    info = rope_info(load_model(second, device='cpu'))
    assert (info.original, info.length, info.scaling.factor) == (WINDOW, 2 * TARGET, 8.)


def test_a_scheme_that_could_not_be_saved_is_refused_before_training(corpus, cli, tmp_path):
    from conftest import make_tokenizer
    from transformers import AutoModelForCausalLM, Phi3Config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Phi3Config(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=WINDOW, original_max_position_embeddings=WINDOW, bos_token_id=0, eos_token_id=1, pad_token_id=None))
    model.save_pretrained(tmp_path/'phi3'); make_tokenizer().save_pretrained(tmp_path/'phi3')
    r = cli(*extend_args(tmp_path/'phi3', corpus.jsonl, tmp_path/'out', scaling='dynamic'))
    assert r.code == 2 and 'cannot express dynamic' in r.err and not (tmp_path/'out').exists()
    assert cli(*extend_args(tmp_path/'phi3', corpus.jsonl, tmp_path/'out', scaling='yarn')).code == 0
    assert rope_info(load_model(tmp_path/'out', device='cpu')).scaling.name == 'yarn'


@pytest.mark.parametrize('words,says', [
    (['--sampler-kwargs', '{"chunks": 3}'], 'chunks has an option of its own'), (['--sampler', 'cream', '--sampler-kwargs', '{"window": 5}'], 'window has an option of its own'),
    (['--sampler', 'cream', '--sampler-kwargs', '{"sigma": Infinity}'], 'sigma is inf'), (['--sampler', 'e2llm', '--sampler-kwargs', '{"max_scale": 1000000}'], 'max_scale is 1000000'),
    (['--sampler', 'turns', '--sampler-kwargs', '{"split_ids": [-5]}'], 'a split id is -5'), (['--target', '33554432'], '16,777,216'), (['--sampler', 'e2llm', '--sampler-kwargs', '{"original": 200}'], 'original window'),
    (['--calibrate', '--per-device-train-batch-size', '100000000', '--no-gradient-checkpointing'], 'nothing can be measured')])
def test_plan_refuses_what_extend_would(words, says, checkpoint, cli):
    r = cli('plan', checkpoint(), *([] if '--target' in words else ['--target', str(TARGET)]), *words)
    assert r.code == 2 and says in r.err and 'Traceback' not in r.err, r.err


def test_a_window_that_leaves_nothing_to_train_on_is_refused(checkpoint, corpus, cli, tmp_path):
    r = cli(*extend_args(checkpoint(), corpus.jsonl, tmp_path/'o', window=2))
    assert r.code == 2 and 'leaves nothing to train on' in r.err and not (tmp_path/'o').exists()


def test_yarn_extends_a_config_that_leaves_the_head_size_open(tmp_path, corpus, cli):
    "MixtralConfig says head_dim=None, and the yarn of transformers multiplies it."
    from conftest import SMALL, make_tokenizer
    from transformers import AutoModelForCausalLM, MixtralConfig
    base = tmp_path/'base'
    AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, vocab_size=300, num_local_experts=2, num_experts_per_tok=1, sliding_window=None)).save_pretrained(base); make_tokenizer().save_pretrained(base)
    for words in (['plan', base, '--target', str(TARGET)], extend_args(base, corpus.jsonl, tmp_path/'o', max_steps=1)):
        r = cli(*words)
        assert r.code == 0, r.err
