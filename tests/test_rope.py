"""Properties of the rotation, and parity with the rotary code of several transformers models."""
import math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import CohereConfig, LlamaConfig
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb as apply_half

from pose_nb.common import PoseError
from pose_nb.rope import inv_freq, layout_permutation, rope_tables, rotate, wavelengths

dims = st.integers(1, 64).map(lambda n: 2 * n)
bases = st.sampled_from([10., 1e4, 5e5, 1e6])
layouts = st.sampled_from(['half', 'interleaved'])
few = settings(max_examples=40, deadline=None)


def vectors(n, dim, seed): return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@few
@given(dims, bases, layouts, st.integers(0, 4000), st.integers(0, 99))
def test_scores_depend_on_distance_only(dim, base, layout, shift, seed):
    q, k, f = vectors(6, dim, seed), vectors(6, dim, seed + 1), inv_freq(dim, base)
    def scores(pos):
        tables = rope_tables(pos, f, layout=layout)
        return rotate(q, *tables, layout) @ rotate(k, *tables, layout).T
    pos = torch.tensor([0, 1, 2, 50, 51, 300])
    assert (scores(pos) - scores(pos + shift)).abs().max() < 2e-12


@few
@given(dims, bases, st.integers(0, 100_000), st.integers(0, 99))
def test_layouts_differ_by_the_permutation(dim, base, start, seed):
    x, f, perm, pos = vectors(4, dim, seed), inv_freq(dim, base), layout_permutation(dim), range(start, start + 4)
    inter = rotate(x, *rope_tables(pos, f, layout='interleaved'), 'interleaved')
    assert torch.equal(rotate(x[:, perm], *rope_tables(pos, f)), inter[:, perm])


@few
@given(dims, bases, layouts, st.floats(0.5, 2), st.integers(0, 99))
def test_norm_and_attention_factor(dim, base, layout, a, seed):
    x = vectors(5, dim, seed)
    y = rotate(x, *rope_tables(range(5), inv_freq(dim, base), a, layout), layout)
    assert torch.allclose(y.norm(dim=-1), torch.full((5,), a, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((y @ y.T).diagonal(), torch.full((5,), a * a, dtype=torch.float64), atol=1e-12)


@few
@given(dims, bases)
def test_frequencies_fall_from_one(dim, base):
    f = inv_freq(dim, base)
    assert f.dtype == torch.float64 and f.shape == (dim // 2,) and f[0] == 1 and (f.diff() < 0).all()
    assert torch.allclose(wavelengths(f) * f, torch.full_like(f, 2 * math.pi), rtol=1e-15)


@pytest.mark.parametrize('dim', [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize('base', [1e4, 5e5, 1e6])
def test_tables_equal_llama(dim, base):
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, rope_parameters={'rope_type': 'default', 'rope_theta': base})
    pos = torch.tensor([0, 1, 2, 100, 2047])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), pos[None])
    ours = rope_tables(pos, inv_freq(dim, base))
    for theirs, mine in zip((cos[0], sin[0]), ours): assert (theirs - mine).abs().max() < 1e-3   # float32 angles up to 2047
    assert (LlamaRotaryEmbedding(config).inv_freq / inv_freq(dim, base) - 1).abs().max() < 1e-6


@pytest.mark.parametrize('layout,theirs', [('half', apply_half), ('interleaved', apply_interleaved)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rotation_equals_transformers(layout, theirs, dtype):
    q, k = torch.randn(2, 2, 3, 7, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    pos = torch.tensor([range(7), range(5000, 5007)])
    cos, sin = (t.to(dtype) for t in rope_tables(pos, inv_freq(16), layout=layout))
    for got, want in zip((rotate(x, cos[:, None], sin[:, None], layout) for x in (q, k)), theirs(q, k, cos, sin)):
        assert got.dtype == dtype
        assert torch.allclose(got, want, atol=1e-6 if layout == 'interleaved' else 0, rtol=0)


def test_inputs_of_every_kind_agree():
    want = rope_tables(torch.arange(4), inv_freq(8))[0]
    for pos in ([0, 1, 2, 3], range(4), np.arange(4), torch.arange(4.)): assert torch.equal(rope_tables(pos, inv_freq(8))[0], want)
    assert torch.equal(rope_tables([0.5], inv_freq(8))[0], rope_tables([1], inv_freq(8) / 2)[0])
    x = torch.randn(4, 8).bfloat16()
    assert rotate(x, *rope_tables(range(4), inv_freq(8))).dtype == torch.bfloat16


def test_gradients_flow():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *rope_tables(range(3), inv_freq(6))), x)


@pytest.mark.parametrize('call', [
    lambda: inv_freq(7), lambda: inv_freq(0), lambda: inv_freq(8.), lambda: inv_freq(None), lambda: inv_freq(8, 1), lambda: inv_freq(8, math.nan), lambda: inv_freq(8, None),
    lambda: wavelengths(torch.tensor([1., -1.])), lambda: layout_permutation(3),
    lambda: rope_tables([0], inv_freq(4), layout='other'), lambda: rope_tables([0], inv_freq(4), -1.), lambda: rope_tables([0], inv_freq(4), math.nan),
    lambda: rope_tables(torch.tensor([0]).half(), inv_freq(4)), lambda: rope_tables([0], inv_freq(4).bfloat16()), lambda: rope_tables([0], inv_freq(4)[None]),
    lambda: rotate(torch.zeros(3, 4), *rope_tables(range(3), inv_freq(8))), lambda: rotate(torch.zeros(3, 4), *rope_tables(range(2), inv_freq(4))),
    lambda: rotate(torch.zeros(2, 2, 3, 4), *rope_tables(torch.zeros(2, 3), inv_freq(4))), lambda: rotate(torch.zeros(3, 4), *rope_tables(range(3), inv_freq(4)), 'neox'),
])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(PoseError) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) < 200
