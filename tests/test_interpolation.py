"""Properties of the scaling schemes, parity with transformers over a grid, and round trips through saved models."""
import itertools, json, math

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose_nb.common import PoseError
from pose_nb.interpolation import *
from pose_nb.rope import inv_freq, wavelengths
from pose_nb.rope_config import *

DIMS, BASES, ORIGINALS, FACTORS = (32, 64, 80, 96, 128), (1e4, 5e5, 1e6), (2048, 8192, 32768), (1, 2, 8, 64, 2.5)
few = settings(max_examples=60, deadline=None)
dims, bases, originals, factors = st.integers(2, 64).map(lambda n: 2 * n), st.sampled_from((1e3, 1e4, 5e5)), st.integers(64, 131072), st.floats(1, 256)


UNBOUNDED = ('dynamic', 'abf')      # by design beyond the factor


def build(name, factor, dim=64, base=1e4):
    "A scheme of any kind; the lists of longrope rise to the factor, and abf raises the base eightfold."
    if name == 'longrope': return LongRoPE(factor, np.geomspace(1, factor, dim // 2).tolist(), [1.] * (dim // 2))
    if name == 'abf': return ABF(factor, base * 8)
    return get_scaling(name, factor)


@few
@given(st.sampled_from(list(SCALINGS)), dims, bases, originals, factors, st.floats(1, 4))
def test_ratios_never_fall_from_the_fastest_pair_to_the_slowest(name, dim, base, original, factor, times):
    s = build(name, factor, dim, base).at(int(original * times), original)
    try: f, a = s(dim, base, original)
    except PoseError as e: assume('ramp is empty' not in str(e)); raise
    r = inv_freq(dim, base) / f
    assert f.dtype == torch.float64 and f.shape == (dim // 2,) and a >= 1
    assert (r >= 1 - 1e-12).all() and (r.diff() >= -1e-9).all()
    if name not in UNBOUNDED: assert (r <= factor * (1 + 1e-12)).all()
    assert (f.diff() < 0).all() or dim == 2
    assert torch.equal(f, s(dim, base, original)[0]) and s.at(10 * original, original) == s      # fixed once it is fixed


@few
@given(dims, bases, originals)
def test_factor_one_changes_nothing(dim, base, original):
    for name in SCALINGS:
        s = ABF(1, base) if name == 'abf' else build(name, 1, dim, base)
        try: f, a = s(dim, base, original)
        except PoseError: continue
        assert torch.allclose(f, inv_freq(dim, base), rtol=1e-14, atol=0) and a == 1


@few
@given(dims, bases, originals, factors)
def test_linear_and_ntk_meet_at_the_last_pair(dim, base, original, factor):
    linear, ntk = Linear(factor)(dim, base, original)[0], NTK(factor)(dim, base, original)[0]
    assert math.isclose(linear[-1], ntk[-1], rel_tol=1e-12) and (linear <= ntk * (1 + 1e-12)).all()


@few
@given(st.sampled_from(['ntk_by_parts', 'yarn', 'yarn_revised', 'llama3']), dims, bases, originals, st.floats(1.1, 64))
def test_schemes_that_count_turns_spare_fast_pairs_and_slow_slow_ones(name, dim, base, original, factor):
    s, turns = get_scaling(name, factor), original / wavelengths(inv_freq(dim, base))
    try: r = s.ratio(dim, base, original)
    except PoseError: return
    fast, slow = (4, 1) if name == 'llama3' else (32, 1)
    strict = name in ('ntk_by_parts', 'llama3')                  # YaRN rounds the ends of its ramp outward to whole pairs
    inside = torch.arange(dim // 2) >= (0 if strict else pair_that_turns(slow, dim, base, original) + 1)
    assert (r[turns >= fast] == 1).all() and torch.allclose(r[(turns < slow) & inside], torch.tensor(float(factor), dtype=torch.float64), rtol=1e-9)


def test_llama3_is_by_parts_with_a_narrow_ramp():
    assert torch.equal(Llama3(8).ratio(128, 5e5, 8192), NTKByParts(8, beta_fast=4).ratio(128, 5e5, 8192))


@few
@given(st.floats(1, 16), st.integers(64, 8192), st.floats(.1, 20))
def test_dynamic_is_ntk_of_a_growing_factor(factor, original, times):
    length = max(1, int(original * times))
    s = DynamicNTK(factor).at(length, original)
    assert math.isclose(s.factor, factor * max(length, original) / original - (factor - 1), rel_tol=1e-9)
    assert DynamicNTK(factor)(64, 1e4, original)[1] == 1 and torch.equal(DynamicNTK(factor)(64, 1e4, original)[0], inv_freq(64, 1e4))


def test_longrope_switches_by_length_and_its_fixed_form_does_not():
    s = LongRoPE(8, long_factor=[4.] * 32, short_factor=[1.] * 32)
    short, long = s.at(2048, 2048), s.at(2049, 2048)
    assert short.long_factor == (1.,) * 32 and long.long_factor == (4.,) * 32 and short.short_factor is long.short_factor is None
    assert s(64, 1e4, 2048)[1] == short(64, 1e4, 2048)[1] == long(64, 1e4, 2048)[1] == math.sqrt(1 + math.log(8) / math.log(2048))


@pytest.mark.parametrize('truncate', [True, False])
def test_yarn_without_rounding_as_gpt_oss(truncate):
    s = YaRN(32, truncate=truncate)
    config = to_config(LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=4096), s, 150_000., 4096, 131_072)
    theirs, a = ROPE_INIT_FUNCTIONS['yarn'](config)
    assert (theirs.double() / s(64, 150_000., 4096)[0] - 1).abs().max() < 1e-6 and from_config(config)[0] == s


@few
@given(dims, bases, originals, factors)
def test_revised_slows_at_least_as_much_as_yarn(dim, base, original, factor):
    try: yarn, revised = YaRN(factor)(dim, base, original)[0], YaRNRevised(factor)(dim, base, original)[0]
    except PoseError: return
    assert (revised <= yarn * (1 + 1e-12)).all()   # a harmonic mean is below an arithmetic one


@few
@given(dims, bases, factors)
def test_ntk_slows_the_last_pair_by_exactly_the_factor(dim, base, factor):
    f, _ = NTK(factor)(dim, base, 2048)
    assert math.isclose(float(inv_freq(dim, base)[-1] / f[-1]), factor, rel_tol=1e-12)
    assert torch.allclose(f, inv_freq(dim, base * factor ** (dim / (dim - 2))), rtol=1e-12, atol=0)


@pytest.mark.parametrize('name', SCALINGS)
@pytest.mark.parametrize('dim,base', list(itertools.product(DIMS, BASES)))
def test_equals_transformers(name, dim, base):
    for original, factor in itertools.product(ORIGINALS, FACTORS):
        s, target = build(name, factor, dim, base), int(original * factor)
        ours, a = s.at(target, original)(dim, base, original)
        p = s.rope_parameters(dim, base, original, target)
        config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=original if name == 'dynamic' else target, rope_parameters=json.loads(json.dumps(p)))
        init = ROPE_INIT_FUNCTIONS.get(p['rope_type'], lambda c, seq_len: LlamaRotaryEmbedding.compute_default_rope_parameters(c))
        theirs, their_a = init(config, seq_len=target)
        few = 1e-5 if name == 'llama3' else 1e-6      # float32: a few roundings, more for large factors and bases; llama3 subtracts nearly equal numbers
        assert (theirs.double() / ours - 1).abs().max() <= few, (original, factor)
        assert their_a == a and p['rope_theta'] and ('attention_factor' in p) == (p['rope_type'] == 'longrope')


@pytest.mark.parametrize('options', [{}, dict(beta_fast=16.), dict(beta_slow=2., beta_fast=20), dict(attention_factor=1.5), dict(attention_factor=1.)])
def test_yarn_options_reach_transformers_and_come_back(options):
    s = YaRN(8, **options)
    config = to_config(LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=2048), s, 1e4, 2048, 16384)
    theirs, a = ROPE_INIT_FUNCTIONS['yarn'](config)
    ours, our_a = s(128, 1e4, 2048)
    assert (theirs.double() / ours - 1).abs().max() < 2e-7 and a == our_a
    assert from_config(config) == (s, 1e4, 2048)


def test_attention_factor_golden():
    for s, a in {1: 1., 2: 1.0693147, 4: 1.1386294, 8: 1.2079441541679836, 16: 1.2772589, 32: 1.3465736, 64: 1.4158883083359672}.items():
        assert abs(YaRN(s)(64, 1e4, 2048)[1] - a) < 1e-7 and YaRN(s)(64, 1e4, 2048)[1] == YaRNRevised(s)(64, 1e4, 2048)[1]


def test_longrope_with_equal_lists_does_not_switch():
    config = to_config(LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=2048), YaRNRevised(8), 1e4, 2048, 16384)
    assert torch.equal(*(ROPE_INIT_FUNCTIONS['longrope'](config, seq_len=n)[0] for n in (2048, 2049)))


def test_correction_range_golden():
    ends = lambda d, b, L: ((yarn_ramp(d, b, L) == 0).sum().item() - 1, (yarn_ramp(d, b, L) < 1).sum().item())
    assert [ends(*x) for x in ((128, 1e4, 2048), (128, 1e4, 4096), (64, 1e4, 2048), (128, 5e5, 8192), (128, 5e5, 131072), (128, 1e6, 32768))] == \
           [(16, 41), (20, 46), (8, 21), (18, 35), (31, 49), (23, 40)]


@pytest.mark.parametrize('name', SCALINGS)
@pytest.mark.parametrize('make', [
    lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)),
    lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, hidden_size=128, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256, rotary_pct=.5)),
], ids=['llama', 'gpt_neox_partial'])
def test_saved_model_reloads_the_same(name, make, tmp_path):
    config = make().config
    base = config.rope_parameters['rope_theta']
    s = build(name, 8, rotary_dim(config), base)
    share = config.rope_parameters.get('partial_rotary_factor')
    to_config(config, s, base, 256, 2048)
    assert config.rope_parameters.get('partial_rotary_factor') == share
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, a = s(rotary_dim(again.config), base, 256)
    for m in (model, again):
        rotary = m.base_model.rotary_emb
        assert (rotary.inv_freq.double() / ours - 1).abs().max() <= 3e-7 and rotary.attention_scaling == a
    assert torch.equal(model.base_model.rotary_emb.inv_freq, again.base_model.rotary_emb.inv_freq)
    scaling, back, original = from_config(again.config)
    assert original == 256 and again.config.max_position_embeddings == (256 if name == 'dynamic' else 2048)
    assert back == base and (scaling == s or name == 'abf' and type(scaling) is NTK)


@few
@given(st.sampled_from(list(SCALINGS)), st.sampled_from((1e4, 5e5)), st.integers(128, 100_000), factors)
def test_config_round_trip(name, base, original, factor):
    s = build(name, factor, 128, base)
    try: config = to_config(LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=original), s, base, original, max(original, int(original * s.factor)))
    except PoseError as e: assume('ramp is empty' not in str(e)); raise
    scaling, back, L = from_config(LlamaConfig.from_dict(json.loads(config.to_json_string())))
    assert (back, L) == (base, original)
    one, two = (x.at(2 * original, original)(128, base, original) for x in (s, scaling))
    assert torch.allclose(one[0], two[0], rtol=1e-9, atol=0) and math.isclose(one[1], two[1], rel_tol=1e-12)


def test_old_style_configs_are_read():
    assert from_config(LlamaConfig.from_dict(dict(rope_theta=5e5, rope_scaling=None, max_position_embeddings=4096))) == (NoScaling(), 5e5, 4096)
    old = LlamaConfig.from_dict(dict(rope_theta=1e4, rope_scaling={'type': 'linear', 'factor': 4.}, max_position_embeddings=4096))
    assert from_config(old, original=1024) == (Linear(4), 1e4, 1024)
    for kind in (PhiConfig(), Qwen3Config()): assert from_config(kind)[0] == NoScaling()
    assert rotary_dim(PhiConfig(hidden_size=256, num_attention_heads=4, partial_rotary_factor=.5)) == 32


def test_numpy_numbers_are_numbers():
    assert YaRN(np.float64(8)) == YaRN(8) == YaRN(np.int64(8)) and hash(YaRN(8)) == hash(YaRN(8.))
    json.dumps(YaRN(np.float64(8)).rope_parameters(np.int64(64), np.float64(1e4), np.int64(2048), np.int64(16384)))


def llama(p, n=4096): return LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=n, rope_parameters=p)

def bare(p):
    "A config whose dictionary transformers has not checked."
    config = llama(None)
    config.rope_parameters = p
    return config


@pytest.mark.parametrize('call', [
    lambda: Linear(.5), lambda: Linear(math.inf), lambda: Linear('8'), lambda: Linear(None), lambda: NTK(True), lambda: NoScaling(2),
    lambda: YaRN(8, beta_fast=1, beta_slow=1), lambda: YaRN(8, beta_slow=0), lambda: YaRN(8, attention_factor=-1), lambda: YaRNRevised(8, beta_fast=math.nan),
    lambda: get_scaling('yarn2', 8), lambda: get_scaling('none', .5), lambda: get_scaling('none', 8, beta_fast=3), lambda: get_scaling('yarn', 8, mscale=1),
    lambda: NTK(8)(2, 1e4, 2048), lambda: Linear(8)(3, 1e4, 2048), lambda: YaRN(8)(64, 1e4, None), lambda: YaRN(8)(64, 1e4, 0), lambda: YaRN(8)(64, 1e4, math.inf), lambda: YaRN(8)(64, 1e4, 3),
    lambda: pair_that_turns(0, 64, 1e4, 2048), lambda: pair_that_turns(1, 63, 1e4, 2048), lambda: pair_that_turns(1, 64, 1, 2048), lambda: yarn_ramp(64, 1e4, None),
    lambda: Linear(8).rope_parameters(64, 1e4, None, 2048), lambda: Linear(8).rope_parameters(64, 1e4, 2048, 1024), lambda: Linear(8).rope_parameters(64, 1e4, 2048, 16385),
    lambda: Linear(8).rope_parameters(64, 1e4, 2048, 4096, partial_rotary_factor=2),
    lambda: from_config(to_config(LlamaConfig(), Linear(2), 1e4, 2048, 4096), original=99),
    lambda: from_config(object()), lambda: from_config(llama({'rope_type': 'linear', 'factor': 2., 'rope_theta': 1e4})),
    lambda: from_config(bare({'rope_type': 'proportional', 'rope_theta': 1e4})), lambda: from_config(bare({'rope_type': 'banana', 'rope_theta': 1e4})),
    lambda: from_config(bare({'full_attention': {'rope_type': 'default'}, 'sliding_attention': {'rope_type': 'default'}})), lambda: wide_layers(bare({'full_attention': {}, 'indexed_attention': {}})), lambda: rope_entry(bare({'sliding_attention': {'rope_type': 'default'}})),
    lambda: from_config(llama(YaRN(2).rope_parameters(128, 1e4, 2048, 4096), 8192)), lambda: from_config(llama({'rope_type': 'linear', 'factor': 2., 'rope_theta': 1e4}), original=1024),
    lambda: LongRoPE(8), lambda: LongRoPE(8, long_factor='1, 2'), lambda: LongRoPE(8, long_factor=[1., 0.]), lambda: LongRoPE(8, [1.] * 32, [1.] * 31)(64, 1e4, 2048), lambda: LongRoPE(8, [1.] * 31)(64, 1e4, 2048),
    lambda: Llama3(8, low_freq_factor=4), lambda: ABF(8)(64, 1e6, 2048), lambda: ABF(8, rope_theta=0), lambda: NTKByParts(8)(64, 1e4, None), lambda: DynamicNTK(8).at(0, 2048),
    lambda: from_config(llama({'rope_type': 'yarn', 'factor': 2., 'rope_theta': 1e4, 'original_max_position_embeddings': 2048, 'mscale': 1., 'mscale_all_dim': 1.})),
    lambda: from_config(bare({'rope_type': 'longrope', 'factor': 2., 'rope_theta': 1e4, 'original_max_position_embeddings': 2048, 'attention_factor': 1.})),
])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(PoseError) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) < 260
