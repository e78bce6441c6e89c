"Tiny checkpoints with real tokenizers, and text files, made on the spot: nothing is downloaded, nothing is shared between sessions."
import json, os, random, subprocess, sys
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1', MPLBACKEND='agg', TQDM_DISABLE='1')
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

WINDOW, TARGET = 64, 256
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=WINDOW, initializer_range=.2)
WORDS = 'the a sea wind stone river light bird night old small green runs falls sings sleeps over under near and then again while before'.split()


@pytest.fixture(scope='session', autouse=True)
def one_thread(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ['HF_DATASETS_CACHE'] = str(tmp_path_factory.mktemp('datasets_cache'))
    os.environ['POSE_NB_CACHE'] = str(tmp_path_factory.mktemp('tokens'))
    import transformers
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()


def make_texts(n=40, words=240, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(words)) for _ in range(n)]


def make_tokenizer(bos=True, vocab=300):
    "A byte-level BPE, trained here; with `bos` it puts `<s>` in front of every text, as Llama's does."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(make_texts(), trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if bos: tok.post_processor = processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', tok.token_to_id('<s>'))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>', **(dict(bos_token='<s>') if bos else {}))


def make_model(kind='llama', vocab=300, **kw):
    from transformers import AutoModelForCausalLM, CodeGenConfig, GPT2Config, GPTJConfig, LlamaConfig, MistralConfig, Qwen2Config
    torch.manual_seed(0)
    if kind in ('gptj', 'codegen'):
        old = dict(n_layer=2, n_head=4, n_embd=64, rotary_dim=8, vocab_size=vocab, n_positions=WINDOW, n_ctx=WINDOW, bos_token_id=0, eos_token_id=1, initializer_range=.2)
        return AutoModelForCausalLM.from_config(dict(gptj=GPTJConfig, codegen=CodeGenConfig)[kind](**old)).eval()
    if kind == 'gpt2': return AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=vocab, n_positions=WINDOW)).eval()
    config = dict(llama=LlamaConfig, mistral=MistralConfig, qwen2=Qwen2Config)[kind]
    return AutoModelForCausalLM.from_config(config(**{**SMALL, 'vocab_size': vocab, 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': None, **kw})).eval()


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    "checkpoint(kind, bos, **config) -> a folder with a tiny random model and its tokenizer; made once for each request."
    made = {}
    def make(kind='llama', bos=True, **kw):
        key = json.dumps([kind, bos, kw], default=str)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)/'base'
            make_model(kind, **kw).save_pretrained(made[key]); make_tokenizer(bos).save_pretrained(made[key])
        return made[key]
    return make


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    "The same forty documents as .txt, .jsonl, .jsonl.gz, .parquet and folder."
    import gzip, pandas as pd
    d, texts = tmp_path_factory.mktemp('corpus'), make_texts()
    lines = ''.join(json.dumps(dict(text=t)) + '\n' for t in texts)
    (d/'folder'/'deep').mkdir(parents=True)
    (d/'f.txt').write_text('\n'.join(texts)); (d/'f.jsonl').write_text(lines)
    with gzip.open(d/'f.jsonl.gz', 'wt') as f: f.write(lines)
    pd.DataFrame(dict(text=texts)).to_parquet(d/'f.parquet')
    for i, t in enumerate(texts[:6]): (d/'folder'/('deep' if i % 2 else '.')/f'{i}.txt').write_text(t)
    return SimpleNamespace(txt=d/'f.txt', jsonl=d/'f.jsonl', gz=d/'f.jsonl.gz', parquet=d/'f.parquet', folder=d/'folder', texts=texts)


@pytest.fixture(scope='session')
def short_corpus(tmp_path_factory):
    "Documents too short for any window used in these tests."
    p = tmp_path_factory.mktemp('short')/'short.jsonl'
    p.write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in make_texts(20, 5)))
    return p


def command(*words): return [str(Path(sys.executable).parent/'pose_nb'), *map(str, words)]


def start(*words, **kw):
    "Start the real command in a process of its own."
    return subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


@pytest.fixture
def cli(capsys):
    "Run the command in this process: fast. -> code, out, err"
    from pose_nb.cli import main
    def run(*words):
        capsys.readouterr()
        try: code = main([str(w) for w in words])
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


def snapshot(folder):
    "{name: bytes} of everything below a folder."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def extend_args(model, data, out, **kw):
    "The words of an `extend` command that trains for three steps."
    options = dict(target=TARGET, data=data, output_dir=out, max_steps=3, learning_rate=1e-3, warmup_steps=1) | kw
    words = ['extend', str(model)]
    for k, v in options.items():
        if v is not None: words += [f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)])
    return words
