"Whatever cannot work is refused with one sentence and exit code 2; nothing is left behind and nothing is lost."
import errno, gzip, json, os, resource, shutil, subprocess
from pathlib import Path

import pytest
from conftest import WINDOW, command, extend_args, snapshot
from safetensors.torch import load_file

from pose_nb.checkpoint import checkpoints, verify_checkpoint
from pose_nb.train import read_log


def assert_refused(r, *says):
    "Exit code 2, nothing on stdout, one sentence on stderr that starts with pose_nb."
    lines = [l for l in r.err.splitlines() if l.strip()]
    assert r.code == 2, (r.code, r.out, r.err)
    assert r.out == '' and len(lines) == 1 and lines[0].startswith('pose_nb') and lines[0].endswith('.') and 'Traceback' not in r.err, r.err
    for s in says: assert s in r.err, r.err


@pytest.fixture
def extend(cli, checkpoint, corpus, tmp_path):
    "extend(**options) -> what the command did; `out` is a new folder."
    def run(model=None, data=None, **kw):
        return cli(*extend_args(model or checkpoint(), data or corpus.jsonl, **dict(out=tmp_path/'out', no_progress=True) | kw))
    return run


REQUESTS = dict(
    target_is_window=(dict(target=WINDOW), 'not longer than the window of 64'),
    target_below_window=(dict(target=10), 'not longer than the window'),
    target_zero=(dict(target=0), 'target 0'),
    target_negative=(dict(target=-5), 'target -5'),
    target_not_a_number=(dict(target='many'), "'many' is not a whole number"),
    target_fraction=(dict(target='2.5'), "'2.5' is not a whole number"),
    target_beyond_int64=(dict(target=10**20), '16,777,216'),
    target_beyond_float32=(dict(target=10**9), '16,777,216'),
    window_one=(dict(window=1), 'window 1'),
    window_zero=(dict(window=0), 'window 0'),
    window_negative=(dict(window=-3), 'window -3'),
    window_beyond_original_and_target=(dict(window=512), 'not longer than the window of 512'),
    chunks_zero=(dict(chunks=0), 'chunks is 0'),
    chunks_negative=(dict(chunks=-1), 'chunks is -1'),
    chunks_beyond_window=(dict(chunks=65), '65 chunks do not fit a window of 64'),
    unknown_scaling=(dict(scaling='yarm'), 'none, linear, ntk, ntk_by_parts, yarn, yarn_revised'),
    unknown_sampler=(dict(sampler='posh'), 'pose, contiguous, full, randpos'),
    unknown_content=(dict(content='x'), 'uniform'),
    unknown_first_chunk=(dict(first_chunk='x'), 'paper'),
    documents_too_short=(dict(sampler='full', target=10**6), 'no document is long enough'),
    no_bos_token=(dict(bos=True), 'no beginning-of-sequence'),
    flash_attention=(dict(attn_implementation='flash_attention_2'), 'flash-attention'),
    flash_attention_3=(dict(attn_implementation='flash_attention_3'), 'flash-attention'),
    unknown_attention=(dict(attn_implementation='magic'), 'magic'),
    steps_zero=(dict(max_steps=0), 'max_steps is 0'),
    steps_negative=(dict(max_steps=-1), 'max_steps is -1'),
    batch_zero=(dict(per_device_train_batch_size=0), 'per_device_train_batch_size'),
    accumulation_negative=(dict(gradient_accumulation_steps=-2), 'gradient_accumulation_steps'),
    rate_zero=(dict(learning_rate=0), 'learning_rate'),
    rate_nan=(dict(learning_rate='nan'), 'learning_rate'),
    rate_infinite=(dict(learning_rate='inf'), 'learning_rate'),
    rate_not_a_number=(dict(learning_rate='fast'), 'learning-rate'),
    beta_one=(dict(adam_beta1=1), 'adam_beta1'),
    warmup_negative=(dict(warmup_steps=-1), 'warmup_steps'),
    seed_negative=(dict(seed=-1), 'seed'),
    workers_negative=(dict(dataloader_num_workers=-1), 'dataloader_num_workers'),
    save_steps_negative=(dict(save_steps=-1), 'save_steps'),
    unknown_schedule=(dict(lr_scheduler_type='zigzag'), 'zigzag'),
    schedule_arguments_wrong=(dict(lr_scheduler_kwargs='{"x": 1}'), 'lr_scheduler_type'),
    schedule_arguments_not_json=(dict(lr_scheduler_kwargs='{'), 'not JSON'),
    schedule_arguments_a_list=(dict(lr_scheduler_kwargs='[1]'), 'JSON object'),
    shares_leave_no_text=(dict(passkey_share=1), 'leave room for text'),
    share_negative=(dict(copy_share=-.5), 'leave room for text'),
    share_nan=(dict(passkey_share='nan'), 'leave room for text'),
    window_too_short_for_passkeys=(dict(passkey_share=.5), 'too short for passkey'),
    missing_data=(dict(data='no/such/file.txt'), 'no/such/file.txt'),
    missing_model=(dict(model='no/such/model'), "no/such/model"),
    wrong_text_field=(dict(text_field='body'), "no field 'body'"),
    resume_without_a_run=(dict(resume_from_checkpoint='latest'), 'holds no run'),
    misspelt_option=(dict(max_step=3), '--max-step'),
)

@pytest.mark.parametrize('name', REQUESTS)
def test_impossible_requests_are_refused(name, extend, checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, says = REQUESTS[name]
    model = checkpoint(bos=False) if name == 'no_bos_token' else None
    assert_refused(extend(**dict(model=model) | options), says)
    assert not list(tmp_path.iterdir()), 'nothing is left on disk'


DATA = dict(
    empty_txt=('x.txt', lambda p: p.write_bytes(b''), 'is empty'),
    blank_txt=('x.txt', lambda p: p.write_text(' \n\n '), 'holds no text'),
    binary_txt=('x.txt', lambda p: p.write_bytes(bytes(range(256)) * 9), 'binary'),
    binary_later=('x.txt', lambda p: p.write_bytes(b'a' * 70_000 + b'\0' * 100), 'binary'),
    latin1_txt=('x.txt', lambda p: p.write_bytes('schön '.encode('latin1') * 900), 'not UTF-8'),
    utf16_txt=('x.txt', lambda p: p.write_bytes(('hello ' * 900).encode('utf-16')), 'x.txt'),
    empty_jsonl=('x.jsonl', lambda p: p.write_bytes(b''), 'is empty'),
    blank_jsonl=('x.jsonl', lambda p: p.write_text('\n\n'), 'x.jsonl'),
    broken_jsonl=('x.jsonl', lambda p: p.write_text('{"text": "a"}\n{"text": '), 'cannot be read as json'),
    latin1_jsonl=('x.jsonl', lambda p: p.write_bytes('{"text": "schön"}\n'.encode('latin1')), 'x.jsonl'),
    number_field=('x.jsonl', lambda p: p.write_text('{"text": 5}\n'), 'holds int, not text'),
    list_field=('x.jsonl', lambda p: p.write_text('{"text": ["a", "b"]}\n'), 'holds list, not text'),
    null_field=('x.jsonl', lambda p: p.write_text('{"text": null}\n'), 'x.jsonl'),
    mixed_field=('x.jsonl', lambda p: p.write_text('{"text": "a"}\n{"text": 5}\n'), 'x.jsonl'),
    jsonl_of_strings=('x.jsonl', lambda p: p.write_text('"a"\n"b"\n'), 'x.jsonl'),
    not_gzip=('x.jsonl.gz', lambda p: p.write_text('{"text": "a"}\n'), 'x.jsonl.gz'),
    cut_gzip=('x.jsonl.gz', lambda p: p.write_bytes(gzip.compress(os.urandom(9000))[:500]), 'x.jsonl.gz'),
    not_parquet=('x.parquet', lambda p: p.write_text('hello'), 'x.parquet'),
    other_suffix_compressed=('x.txt.gz', lambda p: p.write_bytes(gzip.compress(b'text ' * 99)), 'binary'),
    empty_folder=('x', lambda p: p.mkdir(), 'holds no text'),
    mixed_junk=('x', lambda p: (p.mkdir(), (p/'a.txt').write_text('fine'), (p/'b.png').write_bytes(b'\x89PNG\0\0')), 'b.png'),
    short_documents=('x.jsonl', lambda p: p.write_text('{"text": "short"}\n'), 'no document is long enough'),
)

@pytest.mark.parametrize('name', DATA)
def test_data_that_cannot_be_used_is_refused(name, extend, tmp_path):
    file, make, says = DATA[name]
    make(tmp_path/file)
    assert_refused(extend(data=tmp_path/file), says)
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_data_that_may_not_be_read_is_refused(extend, corpus, tmp_path, monkeypatch):
    def no(self, *a, **k): raise PermissionError(errno.EACCES, 'Permission denied', str(self))
    (tmp_path/'x.txt').write_text('text')
    monkeypatch.setattr(Path, 'read_bytes', no)       # root may read everything, so a mode of 000 would not do
    assert_refused(extend(data=tmp_path/'x.txt'), 'Permission denied')


MODELS = dict(
    gpt2=('no rotary position embedding', lambda d: None),
    empty_folder=('not a checkpoint', lambda d: [p.unlink() for p in d.iterdir()]),
    no_weights=('weights of', lambda d: (d/'model.safetensors').unlink()),
    cut_weights=('weights of', lambda d: os.truncate(d/'model.safetensors', 3000)),
    empty_weights=('weights of', lambda d: os.truncate(d/'model.safetensors', 0)),
    cut_config=('not a checkpoint', lambda d: os.truncate(d/'config.json', 60)),
    config_of_a_list=('not a checkpoint', lambda d: (d/'config.json').write_text('[]')),
    no_tokenizer=('tokenizer', lambda d: [p.unlink() for p in d.glob('tokenizer*')]),
    cut_tokenizer=('tokenizer', lambda d: os.truncate(d/'tokenizer.json', 500)),
    weights_of_another_shape=('weights of', lambda d: edit(d/'config.json', hidden_size=64)),
    missing_tensor=('weights of', lambda d: drop_tensor(d/'model.safetensors')),
    proportional_scaling=("rope_type 'proportional'", lambda d: edit(d/'config.json', rope_parameters=dict(rope_type='proportional', rope_theta=1e4))),
    lengths_that_disagree=('carries its original 64 tokens to 128', lambda d: edit(d/'config.json', max_position_embeddings=256, rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2., original_max_position_embeddings=64))),
    linear_without_original=('original length is unknown', lambda d: edit(d/'config.json', rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.))),
    odd_head_dim=('even', lambda d: edit(d/'config.json', head_dim=7)),
    tokenizer_of_another_model=('vocabulary', lambda d: edit(d/'config.json', vocab_size=280) or resize(d/'model.safetensors', 280)),
    nan_weights=('not finite', lambda d: poison(d/'model.safetensors')),
)

def edit(p, **kw): p.write_text(json.dumps(json.loads(p.read_text()) | kw))

def change_weights(p, f):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in f(load_file(p)).items()}, p, metadata=dict(format='pt'))

def drop_tensor(p): change_weights(p, lambda w: {k: v for k, v in w.items() if 'layers.1.mlp' not in k})
def resize(p, n): change_weights(p, lambda w: {k: v[:n] if v.shape[0] == 300 else v for k, v in w.items()})
def poison(p): change_weights(p, lambda w: {k: v * float('nan') if 'layers.1' in k else v for k, v in w.items()})

@pytest.mark.parametrize('name', MODELS)
def test_checkpoints_that_cannot_be_extended_are_refused(name, extend, checkpoint, tmp_path):
    says, damage = MODELS[name]
    d = shutil.copytree(checkpoint('gpt2' if name == 'gpt2' else 'llama'), tmp_path/'model')
    damage(d)
    assert_refused(extend(model=d), says)
    assert [p.name for p in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize('what', ['run', 'files', 'file'])
def test_an_output_directory_in_use_is_left_alone(what, extend, tmp_path):
    out = tmp_path/'out'
    if what == 'run': assert extend(max_steps=1).code == 0
    elif what == 'files': out.mkdir(); (out/'thesis.txt').write_text('years of work')
    else: out.write_text('a file')
    before = snapshot(tmp_path)
    assert_refused(extend(), '--output-dir', *(['already holds another run'] if what == 'run' else []))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('out', ['/dev/null/x', '/proc/pose_nb/x'])
def test_an_output_directory_that_cannot_be_made(out, extend): assert_refused(extend(out=out), 'cannot create')


def test_json_with_an_error_prints_no_json(extend): assert_refused(extend(target=1, json=True), 'target 1')


@pytest.mark.parametrize('words,says', [
    (['extned'], 'unknown command'), (['eval'], 'eval ppl'), (['eval', 'pll'], 'eval ppl'), (['extend'], 'required'), (['coverage', '--window', '8'], '--target'),
    (['coverage', '--window', '8', '--target', '64', '--wat'], '--wat'), (['coverage', '--window', '64', '--target', '8'], 'target 8'), (['coverage', '--window', '-4', '--target', '64'], '-4'),
    (['coverage', '--window', '64', '--target', '10000000000000'], '16,777,216'), (['coverage', '--window', '64', '--target', '256', '--sampler', 'posh'], 'randpos'), (['coverage', '--window', '64', '--target', '256', '--examples', '0'], 'examples'),
    (['coverage', '--window', '64', '--target', '256', '--plot', '/dev/null/x.svg'], 'x.svg'), (['coverage', '--window', '64', '--target', '256', '--plot', 'x.docx'], 'x.docx'),
    (['demo', '--output-dir', '/dev/null/x'], 'cannot create'), (['demo', '--trials', '0', '--output-dir', 'demo_out'], 'trials'), (['demo', '--documents', '0', '--output-dir', 'demo_out'], 'documents'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_other_commands_refuse_what_cannot_work(words, says, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(*words), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words,says', [
    (['ppl', '--lengths', '128,64'], 'increasing'), (['ppl', '--lengths', '64,64'], 'increasing'), (['ppl', '--lengths', 'a,b'], 'whole number'), (['ppl', '--lengths', ''], 'length'), (['ppl', '--lengths', '0,64'], 'length'),
    (['ppl', '--lengths', '-64'], '-64'), (['ppl', '--lengths', '100000'], 'no document'), (['ppl', '--stride', '0', '--lengths', '64'], 'stride'), (['ppl', '--stride', '500', '--lengths', '64'], 'stride'),
    (['ppl', '--documents', '0', '--lengths', '64'], 'documents'), (['ppl', '--documents', '-1', '--lengths', '64'], 'documents'), (['ppl', '--max-tokens', '3', '--lengths', '64'], 'max_tokens'), (['ppl', '--data', 'nowhere.txt'], 'nowhere.txt'),
    (['ppl', '--compare', 'no/such/model', '--lengths', '64'], 'no/such/model'), (['ppl', '--attn-implementation', 'flash_attention_2'], 'flash-attention'),
    (['passkey', '--lengths', '8'], 'too short'), (['passkey', '--trials', '0', '--lengths', '256'], 'trials'), (['passkey', '--depths', '50,10', '--lengths', '256'], 'depths'), (['passkey', '--depths', '101', '--lengths', '256'], 'depths'),
    (['passkey', '--digits', '0', '--lengths', '256'], 'digits'), (['passkey', '--seed', '-1', '--lengths', '256'], 'seed'), (['passkey', '--lengths', '512,256'], 'lengths'), (['passkey', '--bos', '--lengths', '256'], 'BOS'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_evaluations_refuse_what_cannot_work(words, says, cli, checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(checkpoint(bos='--bos' not in words), tmp_path/'model')
    before = snapshot(tmp_path)
    data = ['--data', corpus.jsonl] if words[0] == 'ppl' and '--data' not in words else []
    assert_refused(cli('eval', words[0], model, *words[1:], *data, '--no-progress'), says)
    assert snapshot(tmp_path) == before


def test_odd_paths_and_sizes_work(extend, checkpoint, corpus, cli, tmp_path):
    odd = tmp_path/'Ünï cödé — 你好 %s {x} \'q\''
    model, data = shutil.copytree(checkpoint(), odd/'model'), shutil.copy(corpus.jsonl, odd/'my data.jsonl')
    assert extend(model=model, data=data, out=odd/'out', max_steps=1, window=128, target=2**20).code == 0     # window > original, huge target
    assert extend(model=model, data=data, out=odd/'out2', max_steps=1, target='1k').code == 0
    r = cli('eval', 'ppl', odd/'out2', '--data', data, '--lengths', '64', '--no-progress')
    assert r.code == 0, r.err
    assert extend(model=odd/'out2', data=data, out=odd/'shorter', max_steps=1, window=32, target=40).code == 0     # below the original window


# ---- checkpoints, disks and losses that go wrong -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(checkpoint, corpus, tmp_path_factory):
    "A run of four steps with the checkpoints 2 and 3, which looks as if it was killed at the end; and the words of its command."
    from pose_nb.cli import main
    out = tmp_path_factory.mktemp('saved')/'out'
    words = extend_args(checkpoint(), corpus.jsonl, out, max_steps=4, save_steps=1, save_total_limit=2, no_progress=True)
    assert main(words) == 0
    (out/'config.json').unlink()
    return out, words


def damage(how, path):
    "Damage one file."
    if how == 'cut': os.truncate(path, path.stat().st_size // 2)
    elif how == 'empty': os.truncate(path, 0)
    elif how == 'flip': b = bytearray(path.read_bytes()); b[len(b) // 2] ^= 1; path.write_bytes(b)
    else: path.unlink()

FILES = ['model.safetensors', 'optimizer.bin', 'scheduler.json', 'seen.json', 'random_states_0.pkl', 'manifest.json']

@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('how', ['cut', 'empty', 'flip', 'delete'])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_still_works(file, how, saved, cli, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    words = [str(out) if w == str(saved[0]) else w for w in saved[1]]
    bad = checkpoints(out)[-1]
    assert {p.name for p in bad.iterdir()} == set(FILES)
    damage(how, bad/file)
    before = snapshot(out)
    assert_refused(cli(*words, '--resume-from-checkpoint', bad), 'checkpoint-3')
    assert snapshot(out) == before
    if how != 'cut': return
    r = cli(*words, '--resume-from-checkpoint')
    assert r.code == 0 and 'checkpoint-3' in r.err and 'going on from checkpoint-2' in r.err
    assert [x['step'] for x in read_log(out)] == [1, 2, 3, 4] and verify_checkpoint(out/'checkpoint-3')


def test_when_no_checkpoint_is_whole_it_says_so(saved, cli, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    for p in checkpoints(out): damage('flip', p/'model.safetensors')
    assert_refused(cli(*[str(out) if w == str(saved[0]) else w for w in saved[1]], '--resume-from-checkpoint'), 'none of the 2 checkpoints')


@pytest.mark.parametrize('text', ['[]', '{}', '{"step": 3, "settings": {}, "files": {}}', '{"step": "3", "settings": 5, "files": []}'])
def test_a_manifest_that_is_json_but_no_manifest(text, saved, cli, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    (checkpoints(out)[-1]/'manifest.json').write_text(text)
    assert_refused(cli(*[str(out) if w == str(saved[0]) else w for w in saved[1]], '--resume-from-checkpoint', out/'checkpoint-3'), 'checkpoint-3')


def test_a_damaged_record_is_refused(saved, cli, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    damage('cut', out/'pose_nb.json')
    assert_refused(cli(*[str(out) if w == str(saved[0]) else w for w in saved[1]], '--resume-from-checkpoint'), 'pose_nb.json')


def test_data_that_changed_since_the_run_was_started_is_refused(checkpoint, corpus, cli, tmp_path):
    data, out = Path(shutil.copy(corpus.jsonl, tmp_path/'c.jsonl')), tmp_path/'out'
    words = extend_args(checkpoint(), data, out, max_steps=4, save_steps=1)
    assert cli(*words).code == 0
    text = data.read_text()
    data.write_text(text.replace('sea', 'lake', 1))
    assert_refused(cli(*words, '--resume-from-checkpoint'), 'other content', '--output-dir')
    data.write_text(text)
    assert cli(*words, '--resume-from-checkpoint').code == 0


@pytest.mark.parametrize('where', ['nowhere', 'checkpoint-9', '.'])
def test_resuming_from_something_else_is_refused(where, saved, cli, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    before = snapshot(out)
    assert_refused(cli(*[str(out) if w == str(saved[0]) else w for w in saved[1]], '--resume-from-checkpoint', out/where))
    assert snapshot(out) == before


@pytest.fixture
def small_files():
    "small_files(n): from now on, no file can grow beyond n bytes, as on a full disk."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_no_space_for_the_tokens(extend, corpus, checkpoint, small_files, tmp_path, monkeypatch):
    checkpoint()
    monkeypatch.setenv('POSE_NB_CACHE', str(tmp_path/'tokens'))
    small_files(4000)
    assert_refused(extend(data=corpus.folder), 'free some space')
    small_files(resource.RLIM_INFINITY)
    assert not (tmp_path/'out').exists()


def test_no_space_for_a_checkpoint_keeps_the_one_before(saved, cli, small_files, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    shutil.rmtree(out/'checkpoint-3')
    good, words = snapshot(out/'checkpoint-2'), [str(out) if w == str(saved[0]) else w for w in saved[1]]
    small_files(20_000)      # the log fits, weights do not
    r = cli(*words, '--resume-from-checkpoint')
    small_files(resource.RLIM_INFINITY)
    assert_refused(r, 'step 3', 'free some space')
    assert checkpoints(out) == [out/'checkpoint-2'] and snapshot(out/'checkpoint-2') == good and verify_checkpoint(out/'checkpoint-2')
    assert not [p for p in out.iterdir() if p.name.startswith('.')]
    assert cli(*words, '--resume-from-checkpoint').code == 0 and len(read_log(out)) == 4


def test_no_space_for_the_result_keeps_the_checkpoint(saved, cli, small_files, tmp_path):
    out = shutil.copytree(saved[0], tmp_path/'out')
    words = [str(out) if w == str(saved[0]) else w for w in saved[1]]
    words[words.index('--save-steps') + 1] = '0'
    small_files(20_000)
    r = cli(*words, '--resume-from-checkpoint')
    small_files(resource.RLIM_INFINITY)
    assert_refused(r, 'free some space')
    assert not (out/'config.json').exists() and verify_checkpoint(out/'checkpoint-3')
    assert cli(*words, '--resume-from-checkpoint').code == 0 and (out/'config.json').exists()


@pytest.mark.parametrize('call', ['mkdir', 'replace', 'fsync'])
def test_a_disk_that_fails_anywhere_is_one_sentence(call, extend, monkeypatch):
    def no(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, call, no)
    assert_refused(extend(), 'No space left')


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(extend, tmp_path, monkeypatch):
    import pose_nb.workflow as w
    real = w.make_dataset
    class Poisoned:
        def __init__(self, ds): self.ds, self.report = ds, ds.report
        def __getitem__(self, i): return self.ds[i] if i != 2 else self.ds[i] | dict(loss_weights=self.ds[i]['loss_weights'] * float('nan'))
    monkeypatch.setattr(w, 'make_dataset', lambda *a, **k: Poisoned(real(*a, **k)))
    assert_refused(extend(save_steps=1, max_steps=4), 'loss at step 3', '--learning-rate')
    assert [p.name for p in checkpoints(tmp_path/'out')] == ['checkpoint-1', 'checkpoint-2'] and verify_checkpoint(tmp_path/'out'/'checkpoint-2')['step'] == 2
    monkeypatch.setattr(w, 'make_dataset', real)
    assert extend(save_steps=1, max_steps=4, resume_from_checkpoint='latest').code == 0


def test_the_installed_command_exits_with_2():
    r = subprocess.run(command('coverage', '--window', '8', '--target', '4'), capture_output=True, text=True)
    assert r.returncode == 2 and r.stdout == '' and r.stderr.startswith('pose_nb: target 4') and r.stderr.count('\n') == 1
