"Skipped positions reach the rotation of every supported model and nothing else; frequencies survive every way of handling a model."
import numpy as np, pytest, torch
from conftest import make_model
from transformers import AutoModelForCausalLM

from pose_nb.common import PoseError
from pose_nb.data import collate, training_example
from pose_nb.interpolation import SCALINGS, get_scaling
from pose_nb.model import load_model, rope_info, rotary_modules, seam_guard, set_scaling
from pose_nb.positions import PoSE, example_rng

KINDS = ('llama', 'mistral', 'qwen2')


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
    assert seam_guard(model, pose_batch(target=target)).shifted < 1e-4


def test_seam_guard_refuses_absolute_positions():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300, n_positions=1024))
    with pytest.raises(PoseError, match='something besides RoPE'): seam_guard(gpt2, pose_batch())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', SCALINGS)
def test_set_scaling_round_trip(name, kind, tmp_path):
    model = set_scaling(make_model(kind), get_scaling(name, 8.), 512)
    info = rope_info(model)
    assert info.length == 512 and (info.original == 64 or name == 'ntk')
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
    full = set_scaling(load_model(checkpoint(kind), device='cpu'), get_scaling(name, 8.), 512)
    half = set_scaling(load_model(checkpoint(kind), torch.bfloat16, device='cpu'), get_scaling(name, 8.), 512)
    half.save_pretrained(tmp_path)
    for m in (half, load_model(tmp_path, device='cpu')):
        assert next(m.parameters()).dtype == torch.bfloat16
        for r in rotary_modules(m).values(): assert r.inv_freq.dtype == torch.float32 and torch.equal(r.inv_freq, full.model.rotary_emb.inv_freq)
    assert seam_guard(half, pose_batch()).perturbed > 1e-3
