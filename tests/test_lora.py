"LoRA changes only what it says, trains with the ordinary loop, and leaves a plain model behind."
from dataclasses import replace

import pytest, torch
pytest.importorskip('peft')
from conftest import make_model, make_texts, make_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pose_nb.architectures import tiny_model
from pose_nb.common import PoseError
from pose_nb.data import WindowDataset, tokenize
from pose_nb.export import check_reload, save_extended
from pose_nb.interpolation import Linear, YaRN
from pose_nb.lora import *
from pose_nb.model import load_model, set_scaling
from pose_nb.positions import PoSE
from pose_nb.train import LossModel, TrainSettings, checkpoints, make_optimizer, train

SETTINGS = TrainSettings(max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=1)
FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'phi', 'phi3', 'gpt_neox', 'cohere', 'granite', 'gptj', 'olmo2', 'glm')
EXPERTS = ('mixtral', 'qwen3_moe', 'deepseek_v3', 'qwen3_next')


def dataset(): return WindowDataset(tokenize(make_texts(), make_tokenizer(), progress=False), PoSE(64, 256), seed=0, bos=0)
def model(kind='llama', **kw): return set_scaling(make_model(kind, **kw), YaRN(4.), 256)
def logits(m, n=24): return m(input_ids=torch.arange(n)[None] + 3, use_cache=False).logits.detach()
def layers(m): return [n for n, x in inner_model(m).named_modules() if hasattr(x, 'lora_A')]


def stirred(net, settings=LoraSettings(), size=.05):
    "A model with LoRA, everything trainable moved at random."
    net, gen = add_lora(net, settings), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad: p += size * torch.randn(p.shape, generator=gen)
    return net


@pytest.mark.parametrize('kind', FAMILIES + EXPERTS)
def test_starts_as_the_base_sits_on_the_layers_asked_for_and_merges_exactly(kind):
    base = tiny_model(kind)
    names, want, start = set(base.state_dict()), lora_targets(base, LoraSettings()), logits(base)
    config = base.config.to_dict()
    net = add_lora(base)
    assert sorted(layers(net)) == sorted(want) and torch.equal(logits(inner_model(net)), start)
    assert set(want) == set(linear_layers(tiny_model(kind), attention=kind in EXPERTS))
    net = stirred(tiny_model(kind))
    before = logits(inner_model(net))
    merged = merge_lora(net)
    assert (before - start).abs().max() > .01 * start.abs().max()           # there was something to merge
    assert check_merge(before, logits(merged)) < 1e-5
    assert set(merged.state_dict()) == names and merged.config.to_dict() == config and not hasattr(merged, 'peft_config')
    assert all(p.requires_grad for p in merged.parameters()) and not merged.training


@pytest.mark.parametrize('settings', [LoraSettings(r=3, use_rslora=True), LoraSettings(alpha=1.), LoraSettings(dropout=.5), LoraSettings(targets='attention'), LoraSettings(targets=('v_proj', 'model.layers.1.mlp.up_proj'))])
def test_every_setting_merges_exactly_with_the_scale_it_says(settings):
    net = stirred(model(), settings).eval()
    assert set(layers(net)) == set(lora_targets(model(), settings))
    layer = inner_model(net).model.layers[1].self_attn.v_proj
    want = layer.base_layer.weight + settings.scale * layer.lora_B['default'].weight @ layer.lora_A['default'].weight
    before = logits(inner_model(net))
    merged = merge_lora(net)
    assert check_merge(before, logits(merged)) < 1e-5
    assert torch.allclose(merged.model.layers[1].self_attn.v_proj.weight, want, atol=1e-6)


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
@pytest.mark.parametrize('tied', [True, False])
def test_a_saved_merge_is_a_plain_model_and_stays_tied(kind, tied, tmp_path):
    base = model(kind, tie_word_embeddings=tied)
    head = base.lm_head.weight.clone()
    net = add_lora(base)
    rows = {r['kind']: r for r in trainable_table(net)}
    assert (rows['head']['parameters'] == 0) == tied and rows['head']['trained'] == 0
    train(inner_model(net), dataset(), SETTINGS, progress=False)
    merged = merge_lora(net)
    assert torch.equal(merged.lm_head.weight, head) != tied                  # a tied output moves with the embedding, another stays
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    save_extended(merged, make_tokenizer(), tmp_path)
    check_reload(tmp_path, merged)
    with safe_open(tmp_path/'model.safetensors', 'pt') as f: keys = set(f.keys())
    assert not any('lora' in k or 'base_' in k for k in keys) and ('lm_head.weight' in keys) != tied
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied == stock.config.tie_word_embeddings
    assert not list(tmp_path.glob('adapter*')) and torch.equal(logits(stock), logits(merged))


def test_the_ordinary_loop_trains_what_it_should_and_nothing_else():
    net = add_lora(model())
    old = {n: p.clone() for n, p in inner_model(net).named_parameters()}
    opt, _ = make_optimizer(LossModel(inner_model(net)), SETTINGS)
    assert {id(p) for g in opt.param_groups for p in g['params']} == {id(p) for p in net.parameters() if p.requires_grad}
    result = train(inner_model(net), dataset(), SETTINGS, progress=False)
    assert result.step == 4
    moved = {n for n, p in inner_model(net).named_parameters() if not torch.equal(p, old[n])}
    kinds = ('lora_A', 'lora_B', 'norm', 'embed_tokens')
    assert moved == {n for n in old if any(k in n for k in kinds)}
    assert moved == set(trainable_state(net))


@pytest.mark.parametrize('norms,embeddings', [(False, False), (True, False), (False, True), (True, True)])
def test_the_table_counts_what_is_trained(norms, embeddings):
    net = add_lora(model(), LoraSettings(r=2, train_norms=norms, train_embeddings=embeddings))
    rows = {r['kind']: r for r in trainable_table(net)}
    assert bool(rows['norm']['trained']) == norms and bool(rows['embedding']['trained']) == embeddings and rows['layers']['trained'] == 0
    assert rows['all']['trained'] == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert rows['all']['parameters'] == sum(p.numel() for p in net.parameters())
    assert rows['lora']['parameters'] == sum(2 * sum(m.base_layer.weight.shape) for m in net.modules() if hasattr(m, 'lora_A'))


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_losses(dtype, bf16):
    if dtype == torch.bfloat16 and not bf16: pytest.skip('refused by check_precision')
    def losses(recompute):
        base = make_model()
        for p in base.parameters(): p.data = p.data.to(dtype)
        net = add_lora(set_scaling(base, YaRN(4.), 256), LoraSettings(train_embeddings=False))
        assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
        return [r['loss'] for r in train(inner_model(net), dataset(), replace(SETTINGS, bf16=bf16, gradient_checkpointing=recompute), progress=False).history]
    assert losses(True) == losses(False)


def test_the_matrices_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    a = trainable_state(add_lora(model(), seed=3))
    torch.manual_seed(99); b = trainable_state(add_lora(model(), seed=3)); c = trainable_state(add_lora(model(), seed=4))
    torch.set_rng_state(state); add_lora(model()); model()
    assert all(torch.equal(a[n], b[n]) for n in a) and any(not torch.equal(a[n], c[n]) for n in a)
    torch.manual_seed(5); want = torch.rand(1)
    base = model(); torch.manual_seed(5); add_lora(base)
    assert torch.equal(torch.rand(1), want)


class StopAt:
    def __init__(self, ds, index): self.ds, self.index = ds, index
    def __getitem__(self, i):
        if i == self.index:
            import signal; signal.raise_signal(signal.SIGINT)
        return self.ds[i]


@pytest.mark.parametrize('dropout', [0., .2])
def test_a_checkpoint_of_what_is_trained_resumes_bit_for_bit(tmp_path, dropout, capsys):
    make = lambda: add_lora(model(), LoraSettings(r=2, dropout=dropout))
    straight, resumed = make(), make()
    one = train(inner_model(straight), dataset(), SETTINGS, progress=False)
    assert train(inner_model(make()), StopAt(dataset(), 3), SETTINGS, tmp_path, progress=False).stopped
    ck = checkpoints(tmp_path)[-1]
    assert (ck/'trained.safetensors').exists() and not list(ck.glob('model*'))
    with safe_open(ck/'trained.safetensors', 'pt') as f: assert set(f.keys()) == set(trainable_state(resumed))
    two = train(inner_model(resumed), dataset(), SETTINGS, tmp_path, resume=True, progress=False)
    assert [r['loss'] for r in one.history] == [r['loss'] for r in two.history]
    for (n, a), b in zip(straight.named_parameters(), resumed.parameters()): assert torch.equal(a, b), n


def test_what_was_trained_beside_one_base_merges_into_another():
    net = stirred(model())
    state, there = trainable_state(net), model()
    with torch.no_grad():
        for n in linear_layers(there): there.get_submodule(n).weight.add_(.01)
    want = {n: there.get_submodule(n).weight.detach().clone() for n in linear_layers(there)}
    merged = merge_lora(net, base=there)
    for n, w in want.items():
        assert torch.allclose(merged.get_submodule(n).weight, w + 2 * state[f'{n}.lora_B.default.weight'] @ state[f'{n}.lora_A.default.weight'], atol=1e-6), n
    assert torch.equal(merged.model.norm.weight, state['model.norm.weight']) and torch.equal(merged.model.embed_tokens.weight, state['model.embed_tokens.weight'])
    same = stirred(model())
    before = logits(inner_model(same))
    assert check_merge(before, logits(merge_lora(same, base=model()))) < 1e-5


def test_a_quantized_base_is_not_merged_in_place():
    net = add_lora(model())
    inner_model(net).is_loaded_in_4bit = True
    with pytest.raises(PoseError, match='base=load_model'): merge_lora(net)
    assert is_lora(net)                                                      # nothing was lost
    assert not is_lora(merge_lora(net, base=model()))


def test_four_bits_need_a_library_and_a_gpu(monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None)
    with pytest.raises(PoseError, match='pip install bitsandbytes'): quantization_config()
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: n)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(PoseError, match='GPU'): quantization_config()


def test_a_real_four_bit_base_trains_and_merges_into_a_good_one(tmp_path):
    pytest.importorskip('bitsandbytes')
    from transformers import BitsAndBytesConfig
    make_model(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)
    base = set_scaling(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32), YaRN(4.), 256)
    net = add_lora(base)
    assert is_quantized(base) and {r['kind']: r for r in trainable_table(net)}['layers']['parameters'] > 10**5
    train(inner_model(net), dataset(), replace(SETTINGS, bf16=True), progress=False)
    with pytest.raises(PoseError, match='quantized'): merge_lora(net)
    merged = merge_lora(net, base=set_scaling(load_model(tmp_path, torch.float32, device='cpu'), YaRN(4.), 256))
    assert not is_quantized(merged) and {p.dtype for p in merged.parameters()} == {torch.float32}


def test_merging_in_bfloat16_is_one_rounding_of_the_exact_sum():
    def make():
        base = make_model()
        for p in base.parameters(): p.data = p.data.bfloat16()
        return stirred(set_scaling(base, YaRN(4.), 256))
    exact, rounded = merge_lora(make()), merge_lora(make(), dtype=torch.bfloat16)
    for (n, a), b in zip(exact.named_parameters(), rounded.parameters()): assert a.dtype == torch.float32 and torch.equal(a.bfloat16(), b), n


def test_it_is_quiet(recwarn):
    merge_lora(stirred(model(tie_word_embeddings=True)))
    assert not [w for w in recwarn if 'peft' in str(w.message).lower() or issubclass(w.category, FutureWarning)]


@pytest.mark.parametrize('kw', [dict(r=0), dict(r=-1), dict(r=1.5), dict(alpha=0), dict(alpha=-1.), dict(dropout=1.), dict(dropout=-.1), dict(targets=()), dict(targets='')])
def test_settings_out_of_range_are_refused(kw):
    with pytest.raises(PoseError, match=str(next(iter(kw)))): LoraSettings(**kw)


@pytest.mark.parametrize('name', ['lm_head', 'embed_tokens', 'norm', 'nothing', 'proj', 'attention.q_proj'])
def test_an_unknown_layer_is_refused_with_those_there_are_and_the_model_left_alone(name):
    base = model(tie_word_embeddings=True)
    with pytest.raises(PoseError, match='q_proj, k_proj, v_proj, o_proj'): add_lora(base, LoraSettings(targets=('q_proj', name)))
    assert not is_lora(base) and all(p.requires_grad for p in base.parameters())


def test_other_refusals():
    net = add_lora(model())
    for twice in (net, inner_model(net)):
        with pytest.raises(PoseError, match='already'): add_lora(twice)
    for plain in (model(), inner_model(net)):
        with pytest.raises(PoseError, match='nothing to merge'): merge_lora(plain)
    with pytest.raises(PoseError, match='train_norms=False'): add_lora(tiny_model('olmo'))
    assert add_lora(tiny_model('olmo'), LoraSettings(train_norms=False))
    with pytest.raises(PoseError, match="targets='attention'"): add_lora(tiny_model('deepseek_v3'), LoraSettings(targets=('gate_proj',)))
    with pytest.raises(PoseError, match='set_scaling'): merge_lora(net, base=set_scaling(make_model(), Linear(4.), 256))
    with pytest.raises(PoseError, match='fresh one'): merge_lora(net, base=inner_model(add_lora(model())))
    for a, b in [(torch.ones(3), torch.ones(3) * 1.1), (torch.ones(3), torch.full((3,), float('nan')))]:
        with pytest.raises(PoseError, match='changed the logits'): check_merge(a, b)
    assert is_lora(net)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    state, net = trainable_state(stirred(model())), add_lora(model())
    resized = model(); resized.resize_token_embeddings(308, mean_resizing=False)
    old = trainable_state(net)
    for other in (add_lora(model(), LoraSettings(r=4)), add_lora(resized)):
        before = trainable_state(other)
        with pytest.raises(PoseError, match='same rank'): load_trainable(other, state)
        assert all(torch.equal(t, before[n]) for n, t in trainable_state(other).items())
    with pytest.raises(PoseError, match='in only one'): load_trainable(net, dict(list(state.items())[1:]))
    assert all(torch.equal(t, old[n]) for n, t in trainable_state(net).items())
    assert all(torch.equal(t, state[n]) for n, t in trainable_state(load_trainable(net, state)).items())


def test_state_space_layers_are_left_out():
    base = tiny_model('falcon_h1')
    names = linear_layers(base)
    assert names and not any('mamba' in n for n in names)
    net = stirred(base)
    before = logits(inner_model(net))
    assert check_merge(before, logits(merge_lora(net))) < 1e-4


def test_a_half_precision_base_needs_bf16():
    base = make_model()
    for p in base.parameters(): p.data = p.data.bfloat16()
    net = add_lora(base)
    with pytest.raises(PoseError, match='bfloat16 and float32'): check_precision(net, bf16=False)
    check_precision(net, bf16=True); check_precision(add_lora(model()), bf16=False)
