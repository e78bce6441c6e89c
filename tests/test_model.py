"Skipped positions reach the rotation of every supported model and nothing else; frequencies survive every way of handling a model."
import numpy as np, pytest, torch
from conftest import make_model
from transformers import AutoModelForCausalLM

from pose_nb.common import PoseError
from pose_nb.data import collate, training_example
from pose_nb.interpolation import ABF, LongRoPE, NTK, SCALINGS, YaRN, get_scaling
from pose_nb.model import feed_positions, frequencies, load_model, rope_info, rotary_modules, seam_guard, set_scaling
from pose_nb.positions import PoSE, example_rng

KINDS = ('llama', 'mistral', 'qwen2')


def scheme(name, dim=16, factor=8.):
    "A scheme of any kind that goes from 64 to 512 tokens."
    if name == 'longrope': return LongRoPE(factor, np.geomspace(1, factor, dim // 2).tolist(), [1.] * (dim // 2))
    return get_scaling(name, factor)


def pose_batch(window=64, target=1024, rows=2):
    "What the collator makes of windows with one jump each."
    sampler, rng = PoSE(window, target), np.random.default_rng(0)
    return collate([training_example(rng.integers(2, 300, 5 * window), sampler(5 * window, example_rng(0, 0, i))) for i in range(rows)])


def model_in_mode(kind, attention, mode, **kw):
    m = make_model(kind, **kw)
    m.set_attn_implementation(attention)
    if mode == 'checkpointing': m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return m.train(mode != 'eval')


@pytest.mark.parametrize('mode', ['train', 'checkpointing', 'eval'])
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('kind', KINDS)
def test_seam_guard_passes_with_the_collators_batch_and_refuses_it_without_mask(kind, attention, mode):
    model, batch = model_in_mode(kind, attention, mode), pose_batch()
    r = seam_guard(model, batch)
    assert r.perturbed > 1e-3 and r.closed > 1e-3 and r.shifted < 1e-4 < r.perturbed
    assert model.training == (mode != 'eval'), 'the guard leaves the mode as it was'
    with pytest.raises(PoseError, match='attention is cut'): seam_guard(model, {k: v for k, v in batch.items() if k != 'attention_mask'})


@pytest.mark.parametrize('mode', ['train', 'checkpointing'])
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_cross_the_seam(kind, attention, mode):
    "The guard runs without gradients; this is the same question with them: the loss after the seam has a gradient at the tokens before it."
    model, batch = model_in_mode(kind, attention, mode), pose_batch(rows=1)
    seam = int((batch['position_ids'][0].diff() != 1).nonzero()[0]) + 1
    x = model.get_input_embeddings()(batch['input_ids']).detach().requires_grad_()
    model(inputs_embeds=x, position_ids=batch['position_ids'], attention_mask=batch['attention_mask'], use_cache=False).logits[:, seam:].sum().backward()
    assert (x.grad[0, :seam].abs().amax(-1) > 0).all()


@pytest.mark.parametrize('target', [2**17, 2**20, 2**24])
def test_seam_guard_is_not_fooled_by_float32_angles_at_far_positions(target):
    model = set_scaling(make_model(), get_scaling('yarn', target / 64), target)
    assert seam_guard(model, pose_batch(target=target), shifts=[57]).shifted < 1e-4
    seam_guard(model, pose_batch(target=target))


def test_seam_guard_refuses_absolute_positions():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300, n_positions=1024))
    with pytest.raises(PoseError, match='something besides RoPE'): seam_guard(gpt2, pose_batch())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', SCALINGS)
def test_set_scaling_round_trip(name, kind, tmp_path):
    model = set_scaling(make_model(kind), scheme(name), 512)
    info = rope_info(model)
    assert (info.length, info.original) == (512, 64) and (info.scaling == scheme(name) or name == 'abf')
    model.save_pretrained(tmp_path)
    stock, pos = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(448, 512)[None]
    with torch.no_grad(): a, b = (m(torch.arange(64)[None], position_ids=pos, attention_mask=torch.ones_like(pos)).logits for m in (model, stock))
    assert torch.equal(a, b) and torch.equal(stock.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert rope_info(load_model(tmp_path, device='cpu')) == info


def test_schemes_do_not_compound():
    model = make_model()
    for name in ('linear', 'yarn', 'yarn_revised', 'none', 'yarn'): set_scaling(model, get_scaling(name, 8. if name != 'none' else 1.), 512)
    assert torch.equal(model.model.rotary_emb.inv_freq, set_scaling(make_model(), get_scaling('yarn', 8.), 512).model.rotary_emb.inv_freq)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', SCALINGS)
def test_frequencies_stay_float32_in_bfloat16(name, kind, checkpoint, tmp_path):
    full = set_scaling(load_model(checkpoint(kind), device='cpu'), scheme(name), 512)
    half = set_scaling(load_model(checkpoint(kind), torch.bfloat16, device='cpu'), scheme(name), 512)
    half.save_pretrained(tmp_path)
    for m in (half, load_model(tmp_path, device='cpu')):
        assert next(m.parameters()).dtype == torch.bfloat16
        for r in rotary_modules(m).values(): assert r.inv_freq.dtype == torch.float32 and torch.equal(r.inv_freq, full.model.rotary_emb.inv_freq)
    assert seam_guard(set_scaling(half, scheme(name).at(512, 64), 512), pose_batch()).perturbed > 1e-3


@pytest.mark.parametrize('name', ['dynamic', 'longrope'])
def test_a_skipped_batch_does_not_change_the_frequencies_of_a_model_set_for_training(name):
    moving, fixed, batch = set_scaling(make_model(), scheme(name), 512), set_scaling(make_model(), scheme(name).at(512, 64), 512), pose_batch()
    with pytest.raises(PoseError, match='changes its frequencies'): seam_guard(set_scaling(make_model(), scheme(name), 512), batch)
    for model, changes in ((moving, True), (fixed, False)):
        before = model.model.rotary_emb.inv_freq.clone()
        with torch.no_grad(): model(**{k: batch[k] for k in ('input_ids', 'position_ids', 'attention_mask')}, use_cache=False)
        assert torch.equal(before, model.model.rotary_emb.inv_freq) != changes


def test_a_scheme_that_does_not_fit_leaves_the_model_as_it_was():
    model = set_scaling(make_model(), YaRN(8.), 512)
    before, held = model.config.to_dict(), model.model.rotary_emb
    for bad in (LongRoPE(8., [1.] * 3), ABF(8., 5_000.), NTK(2.)):
        with pytest.raises(PoseError): set_scaling(model, bad, 512)
        assert model.config.to_dict() == before and model.model.rotary_emb is held


def test_a_model_whose_layers_differ_is_scaled_in_its_full_attention_layers_only(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=128))
    short = model.model.rotary_emb.sliding_attention_inv_freq.clone()
    set_scaling(model, YaRN(8.), 512)
    model.save_pretrained(tmp_path)
    for m in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(m.model.rotary_emb.sliding_attention_inv_freq, short)
        assert torch.allclose(frequencies(m.model.rotary_emb)[0].double(), YaRN(8.)(16, 1e6, 64)[0], rtol=1e-6)
    seam_guard(model, pose_batch())


def test_the_guard_sees_what_begins_only_far_out():
    "Ministral 3 scales its queries by position, from its original length on."
    from transformers import Ministral3Config, Ministral3ForCausalLM
    torch.manual_seed(0)
    rope = dict(rope_type='yarn', rope_theta=1e4, factor=8., original_max_position_embeddings=4096, llama_4_scaling_beta=.1)
    model = Ministral3ForCausalLM(Ministral3Config(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=32_768, rope_parameters=rope, initializer_range=.2))
    assert seam_guard(model, pose_batch(), shifts=[57]).shifted < 1e-4
    with pytest.raises(PoseError, match='adding 32768 to all positions'): seam_guard(model, pose_batch())


def test_a_model_that_amplifies_rounding_is_not_refused_far_out():
    "Sixteen layers with large random weights: float32 angles at 131,072 move its logits by percents, and that is no reason to refuse it."
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8, max_position_embeddings=2048, initializer_range=.06)).eval()
    seam_guard(set_scaling(model, YaRN(64.), 131_072), pose_batch(target=131_072))


@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'mistral'])
def test_fractions_reach_rope_and_nothing_else(kind):
    from pose_nb.train import LossModel
    net = make_model(kind)
    ids = torch.arange(48)[None] + 3
    mask, whole = torch.ones_like(ids), torch.arange(48)[None] * 2 + (torch.arange(48)[None] > 20) * 100
    def gradients(p, checkpointing):
        net.train(); net.zero_grad()
        (net.gradient_checkpointing_enable if checkpointing else net.gradient_checkpointing_disable)()
        LossModel(net)(dict(input_ids=ids, labels=ids, position_ids=p, attention_mask=mask, loss_weights=torch.ones(1, 48))).backward()
        feed_positions(net, None)
        return torch.cat([q.grad.flatten() for q in net.parameters()])
    want = gradients(whole, False)
    for p, c in ((whole, True), (whole.float(), False), (whole.float(), True)): assert torch.equal(gradients(p, c), want)
    third = gradients(whole.float() / 3, False)
    assert torch.equal(gradients(whole.float() / 3, True), third) and not torch.allclose(third, want)
    assert not any(m._forward_pre_hooks for m in net.modules())
    net.eval()
    report = seam_guard(net, dict(input_ids=ids, position_ids=whole.float() / 3, attention_mask=mask))
    assert report.perturbed > 1e-6 and report.closed > 1e-7
