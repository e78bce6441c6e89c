"Relative maps: rows of the papers, an oracle written apart from the package, every way to read a text, and every way to ask for too much."
import copy, functools, math, os, subprocess, sys, warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, CohereConfig, DynamicCache, Gemma2Config, Gemma3TextConfig, GemmaConfig, GlmConfig, GPT2Config,
                          GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, Olmo2Config, PhiConfig, Qwen2Config, Qwen3Config)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pose_nb import relative as page
from pose_nb.architectures import tiny_model
from pose_nb.common import PoseError
from pose_nb.relative import (DCA, DPE, LMInfinite, LeakyReRoPE, NAME, ReRoPE, RelativeMap, STRING, SelfExtend, ask_rotation, attend, clear_relative, dense_attention, get_relative, last_row, merge, relative,
                              relative_attention, set_relative)

sys.path.insert(0, str(Path(__file__).parent/'bench'))
import bench

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:.*farther keys are at distances')      # tiny windows are left on purpose
quick = settings(deadline=None, max_examples=60)


# ---------------------------------------------------------------------------------------------- the maps themselves

def row(rel, T): return last_row(rel, T)


GOLDEN = [(SelfExtend(2, 4), 10, [6, 6, 5, 5, 4, 4, 3, 2, 1, 0]), (SelfExtend(2, 4), 9, [6, 6, 5, 5, 4, 3, 2, 1, 0]), (SelfExtend(2, 4), 6, [4, 4, 3, 2, 1, 0]),
          (ReRoPE(4), 10, [4, 4, 4, 4, 4, 4, 3, 2, 1, 0]), (LeakyReRoPE(4, 4.), 10, [5.25, 5, 4.75, 4.5, 4.25, 4, 3, 2, 1, 0]),
          (STRING(3, 0), 9, [5, 4, 3, 2, 1, 0, 2, 1, 0]), (STRING(3, 1), 9, [6, 5, 4, 3, 2, 1, 2, 1, 0]), (STRING(3, 2), 9, [7, 6, 5, 4, 3, 2, 2, 1, 0]), (STRING(6, 2), 9, [4, 3, 2, 5, 4, 3, 2, 1, 0]),
          (DCA(6, 9), 12, [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]), (DCA(6, 9), 14, [9, 8, 7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0]), (DCA(6, 10), 12, [10, 9, 8, 7, 6, 5, 5, 4, 3, 2, 1, 0]),
          (RelativeMap(), 5, [4, 3, 2, 1, 0])]

@pytest.mark.parametrize('rel,T,want', GOLDEN)
def test_rows_of_the_papers(rel, T, want): assert row(rel, T) == want


def test_rows_of_dpe_and_lm_infinite():
    at = torch.arange(10)
    rho = DPE((1, 2, 4), 4, pairs=3).distance(at[9:], at)[0].T.tolist()
    assert rho == [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [6, 6, 5, 5, 4, 4, 3, 2, 1, 0], [5, 5, 5, 5, 4, 4, 3, 2, 1, 0]]
    got = row(LMInfinite(4, 2), 10)
    assert got[:2] == [3, 3] and all(map(math.isnan, got[2:6])) and got[6:] == [3, 2, 1, 0]


def test_numbers_of_the_papers():
    assert SelfExtend(8, 1024).reach(4096) == 25600 and SelfExtend(8, 512).reach(4096) == 29184 and SelfExtend(4, 512).reach(2048) == 6656
    assert max(row(SelfExtend(8, 1024), 25600)) == 4095
    S = int(.33 * 131072)
    assert S == 43253 and 131072 - 1 - S + 128 == max(row(STRING(S, 128), 131072)) == 87946
    d = DCA(6, 9)
    assert [int(d.regions()[1].query(torch.tensor([6 + i]))) for i in range(6)] == [6, 7, 8, 9, 9, 9]
    assert DCA.of(4096) == DCA(3072, 4095) and DCA.of(4096, 'code') == DCA(2560, 3072) and DCA.of(4096, variant='Paper') == DCA(3072, 4095)
    far = DPE((4, 4, 2, 16, 32, 32, 16, 128), 1024).distance(torch.tensor([131071]), torch.tensor([0]))[0, 0]
    assert far[::8].tolist() == [33535, 33535, 66047, 9151, 5087, 5087, 9151, 2039]         # beyond the window of 8,192 by design


def rho(rel, m, n, pair=0, layer=0, head=0):
    "Every map once more, one pair of tokens at a time, from the papers' definitions; None: not seen."
    d = m - n
    if isinstance(rel, SelfExtend): return d if d < rel.window else m // rel.group - n // rel.group + rel.window - rel.window // rel.group
    if isinstance(rel, ReRoPE): return min(d, rel.window)
    if isinstance(rel, LeakyReRoPE): return d if d < rel.window else rel.window + (d - rel.window) / rel.factor
    if isinstance(rel, STRING): return d if d < rel.shift else d - rel.shift + rel.local
    if isinstance(rel, DCA):
        s, a, b = rel.chunk, m // rel.chunk, n // rel.chunk
        return (m % s if a == b else min(s + m % s, rel.cap) if a == b + 1 else rel.cap) - n % s
    if isinstance(rel, LMInfinite): return d if d < rel.window else rel.window - 1 if n < rel.first else None
    if isinstance(rel, DPE):
        G = rel.scales[pair // (rel.pairs // len(rel.scales))]
        if rel.keep is not None and pair not in rel.keep[layer][head]: G = 1
        return d if d < rel.window else m // G - n // G + rel.window - rel.window // G
    return d


@st.composite
def maps(draw, pairs=4):
    w, k = draw(st.integers(1, 24)), draw(st.sampled_from([1., 1.5, 2., 4., 7.25, 16.]))
    G, s, S = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 24))
    powers = st.sampled_from([1, 2, 4])
    return draw(st.sampled_from([RelativeMap(), SelfExtend(G, G * draw(st.integers(1, 6))), ReRoPE(w), LeakyReRoPE(w, k), STRING(S, draw(st.integers(0, S))), DCA(s, s + draw(st.integers(0, 9))),
                                 LMInfinite(w, draw(st.integers(0, 5))), DPE(tuple(draw(powers) for _ in range(pairs)), 4 * draw(st.integers(1, 5)), pairs)]))


@quick
@given(maps(), st.integers(1, 60))
def test_regions_are_disjoint_complete_and_as_defined(rel, T):
    at = torch.arange(T)
    m, n = at[:, None], at[None]
    times = sum(r.sees(m, n).int() for r in rel.regions())
    seen = times[(n <= m).expand(T, T)]
    assert not times[(n > m).expand(T, T)].any()                                             # no region looks ahead
    assert (seen <= 1).all() and (isinstance(rel, LMInfinite) or (seen == 1).all())
    got, pairs = rel.distance(at, at), rel.pairs if isinstance(rel, DPE) else 1
    got = got if got.dim() == 3 else got[..., None]
    for i, j, p in product(range(0, T, max(1, T // 12)), range(T), range(pairs)):
        want = rho(rel, i, j, p) if j <= i else None
        assert math.isnan(got[i, j, p]) if want is None else got[i, j, p] == pytest.approx(want, abs=1e-5), (i, j, p)


@quick
@given(maps(), st.integers(1, 60))
def test_near_distances_are_exact(rel, T):
    near = {SelfExtend: 'window', ReRoPE: 'window', LeakyReRoPE: 'window', STRING: 'shift', LMInfinite: 'window', DPE: 'window'}
    exact = getattr(rel, near[type(rel)]) if type(rel) in near else min(rel.cap - rel.chunk, rel.chunk) + 1 if isinstance(rel, DCA) else T
    at = torch.arange(T); d = (at[:, None] - at[None]).double()
    got = rel.distance(at, at)
    got = got if got.dim() == 3 else got[..., None]
    close = (d >= 0) & (d < exact)
    assert (got[close] == d[close][:, None]).all()


@quick
@given(maps(), st.integers(1, 60))
def test_reach_is_tight(rel, L):
    try: reach = rel.reach(L)
    except PoseError as e:
        assert 'use at most' in str(e)
        return
    longest = lambda T: max(np.nanmax(rel.distance(torch.tensor([m]), torch.arange(T)).numpy()) for m in range(max(0, T - 40), T))
    if isinstance(rel, DPE): assert reach is None          # may pass the window by design
    elif reach is None: assert longest(3 * L + 100) < L
    else: assert longest(reach) < L - 1e-5 and longest(reach + 1) > L - 1e-5          # (fractions of leaky maps are float32)


@pytest.mark.parametrize('rel,L', [(LeakyReRoPE(16, 16.), 16), (SelfExtend(4, 16), 16), (STRING(16, 0), 16), (LMInfinite(16), 16)])
def test_a_near_window_as_long_as_the_models_still_reaches_it(rel, L): assert (rel.reach(L) or L) >= L


@quick
@given(st.integers(1, 20), st.integers(1, 60))
def test_limits(w, T):
    plain, at = row(RelativeMap(), T), torch.arange(T)
    same = [SelfExtend(1, w), SelfExtend(w, w * math.ceil(T / w)), LeakyReRoPE(w, 1.), STRING(w, w), DCA(T, T + w), LMInfinite(T, 0), ReRoPE(T), STRING(T, 0)]
    for rel in same: assert row(rel, T) == pytest.approx(plain, abs=1e-5), rel
    assert row(LeakyReRoPE(w, 1e12), T) == pytest.approx(row(ReRoPE(w), T), abs=1e-5)
    for rel in (DPE((1,) * 4, w, 4), DPE((2, 4, 8, 8), 8 * w, 4, keep=(((), ()),))): assert (rel.distance(at[-1:], at)[..., -1, :, :] == torch.tensor(plain).double()[:, None]).all()
    for G in (2, 3):
        rel = DPE((G,) * 2, G * w, 4).distance(at[-1:], at)[0]
        assert (rel == torch.tensor(row(SelfExtend(G, G * w), T)).double()[:, None]).all()


REFUSALS = [(lambda: SelfExtend(6, 1024), 'group 6 does not divide window 1024.*such as 1020'), (lambda: SelfExtend(8, 4), 'such as 8'), (lambda: SelfExtend(0, 8), 'group'), (lambda: SelfExtend(2.5, 10), 'group'),
            (lambda: SelfExtend(2, 0), 'window'), (lambda: SelfExtend(2, -4), 'window'), (lambda: ReRoPE(0), 'window'), (lambda: ReRoPE('a'), 'window'), (lambda: LeakyReRoPE(8, .5), 'at least 1'),
            (lambda: LeakyReRoPE(8, math.inf), 'at least 1'), (lambda: LeakyReRoPE(8, math.nan), 'at least 1'), (lambda: STRING(8, 9), 'use at most 8'), (lambda: STRING(0, 0), 'shift'), (lambda: STRING(8, -1), 'local'),
            (lambda: DCA(8, 7), 'use at least 8'), (lambda: DCA(0, 7), 'chunk'), (lambda: DCA.of(4096, 'papr'), 'choose one of: paper, code'), (lambda: LMInfinite(0), 'window'), (lambda: LMInfinite(4, -1), 'first'),
            (lambda: DPE((1, 3), 128, 16), 'scale 3 does not divide'), (lambda: DPE((1, 2, 4), 128, 16), 'use a number that divides 16'), (lambda: DPE((), 128, 16), '0 scales'), (lambda: DPE((0, 1), 128, 16), 'scale'),
            (lambda: SelfExtend(2, 8, log_n=1), 'log_n is 1'), (lambda: ReRoPE(8, log_n=2.5), 'log_n'), (lambda: STRING(8, 2, attention_factor=0.), 'above 0'), (lambda: DCA(8, 9, math.inf), 'above 0'), (lambda: DCA(8, 9, math.nan), 'above 0'),
            (lambda: DPE((1, 2), 128, 16, keep=(((16,),),)), 'from 0 to 15'), (lambda: DPE((1, 2), 128, 16, keep=(((-1,),),)), 'from 0 to 15'),
            (lambda: LeakyReRoPE(8, 'x'), "factor is 'x'"), (lambda: STRING(8, 2, 'x'), "attention_factor is 'x'"), (lambda: DCA(8, 9, True), 'attention_factor is True'), (lambda: DPE(4, 128, 16), 'scales are 4'), (lambda: DCA.of('a'), "window is 'a'"),
            (lambda: DPE((1, 2), 128, 16, keep=5), 'lists of pairs'), (lambda: DPE((1, 2), 128, 16, keep=((1,),)), 'lists of pairs'), (lambda: DPE((1, 2), 128, 16, keep=(((1.5,),),)), 'lists of pairs'),
            (lambda: get_relative('self_extend', 256, 32768), 'reaches 16,512 tokens.*or lengths up to 16,512'), (lambda: get_relative('dca', 256, 1024, variant='papr'), 'choose one of: paper, code'),
            (lambda: get_relative('dpe', 256, 1024), 'name the dpe.json'), (lambda: get_relative('dpe', 256, 1024, source='no'), 'no'), (lambda: get_relative('rerope', 256, 1024, source='no'), "no setting 'source'"),
            (lambda: SelfExtend(8, 512).reach(256), 'use at most 256'), (lambda: ReRoPE(256).reach(256), 'use at most 255'), (lambda: LeakyReRoPE(300).reach(256), 'use at most 256'),
            (lambda: STRING(300, 8).reach(256), 'use at most 256'), (lambda: DCA(64, 256).reach(256), 'use at most 255'), (lambda: LMInfinite(300).reach(256), 'use at most 256')]

def sharp(rel, m):
    "Factor on the logits of the query at m, once more."
    f = max(1, math.log(m + 1) / math.log(rel.log_n)) if getattr(rel, 'log_n', None) else 1
    return f * getattr(rel, 'attention_factor', 1)**2


def test_maps_by_name():
    assert get_relative('Self-Extend', 256, 2048) == SelfExtend(16, 128) and get_relative('self_extend', 256, 16512) == SelfExtend(128, 128)
    assert get_relative('dca', 4096, 8192) == DCA(3072, 4095) and get_relative('dca', 4096, 8192, variant='code') == DCA(2560, 3072) and get_relative('dca', 4096, 8192, variant='code', cap=4000) == DCA(2560, 4000)
    assert get_relative('dpe', 8192, 16384, source='llama3-8b-readme').scales == (4, 4, 2, 16, 32, 32, 16, 128)


def test_sharper_queries():
    for rel in (SelfExtend(8, 1024, log_n=4096), ReRoPE(512, log_n=4096), LeakyReRoPE(512, log_n=4096)):
        assert rel.sharpness(torch.tensor([0, 4095, 8191, 16383, 131071])).tolist() == pytest.approx([1, 1, 1.083333, 1.166667, 1.416667], abs=1e-5)     # numbers of the released code's formula
    assert STRING(8, 2, 1.1).sharpness(torch.tensor([5])) == pytest.approx(1.21) and DCA(8, 9, attention_factor=1.1).sharpness(torch.tensor([5])) == pytest.approx(1.21)
    assert all(r.sharpness(torch.tensor([10**6])) == 1 for r in (SelfExtend(), ReRoPE(), LeakyReRoPE(), STRING(), DCA(), LMInfinite(), DPE()))           # off where nothing is said


@pytest.mark.parametrize('bad,says', REFUSALS)
def test_settings_out_of_range_are_one_sentence(bad, says):
    with pytest.raises(PoseError, match=says) as e: bad()
    assert '\n' not in str(e.value) and str(e.value).endswith('.')


# ---------------------------------------------------------------------------------------------- attention over sets of keys

def plain_attention(q, k, v, seen, scale, softcap=None):
    z = q.double() @ k.double().transpose(-1, -2) * scale
    if softcap: z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~seen, -math.inf)
    return z.softmax(-1).nan_to_num() @ v.double(), z.logsumexp(-1)


@pytest.mark.parametrize('dtype,eps', [(torch.float32, 1e-5), (torch.float64, 1e-11), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize('path', ['kernel', 'plain', 'softcap'])
def test_attend_equals_softmax_on_every_path(dtype, eps, path):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16).to(dtype) for n in (37, 53, 53))
    seen = torch.rand(2, 1, 37, 53) < .3
    seen[0, 0, 5] = seen[1, 0, 0] = False                     # rows that see nothing
    if path == 'plain': q = q.clone().requires_grad_()
    cap = 5. if path == 'softcap' else None
    out, lse = attend(q, k, v, seen, .3, cap)
    want, ref = plain_attention(q, k, v, seen, .3, cap)
    some = seen.any(-1).expand(2, 4, 37)
    assert out.dtype == dtype and (out.double() - want)[some].abs().max() < eps and (lse.double() - ref)[some].abs().max() < (1e-5 if dtype == torch.float32 else 10 * eps)
    assert (lse[~some] == -math.inf).all() and not out[~some].any()          # nothing seen: zeros, not NaN
    if dtype == torch.float64: assert lse.dtype == torch.float64


@pytest.mark.parametrize('parts', [1, 2, 3, 5])
def test_merge_of_disjoint_sets_is_attention_over_all(parts):
    torch.manual_seed(parts)
    q, k, v = (torch.randn(2, 4, 40, 16) for _ in range(3))
    seen, owner = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(), torch.randint(0, parts, (2, 1, 40, 40))
    seen[:, :, 7] = False
    owner[:, :, 20] = 0                                       # all but one part empty
    got = merge([attend(q, k, v, seen & (owner == p), .3) for p in range(parts)])
    want = plain_attention(q, k, v, seen, .3)[0]
    assert (got.double() - want).abs().max() < 1e-5
    assert not got[:, :, 7].any()                             # nothing seen: zeros, not NaN
    half = merge([(o.bfloat16(), l) for o, l in [attend(q, k, v, seen & (owner == p), .3) for p in range(parts)]])
    assert half.dtype == torch.bfloat16 and (half.double() - want).abs().max() < 2e-2


def pieces(rel, q, k, v, at, r, cuts, layer=0):
    module = SimpleNamespace(relative=page._InLayer(rel, r, layer))
    ends = [0, *cuts, q.shape[2]]
    return torch.cat([relative_attention(module, q[:, :, i:j], k[:, :, :j], v[:, :, :j], None, .3, at[None, i:j])[0] for i, j in zip(ends, ends[1:]) if i < j], 1).transpose(1, 2)


@settings(deadline=None, max_examples=40)
@given(maps(), st.integers(1, 70), st.lists(st.integers(0, 69), max_size=6), st.sampled_from([1, 7, 256]), st.integers(0, 9))
def test_dense_and_fast_agree_for_every_map_length_and_chunking(rel, T, cuts, block, seed):
    torch.manual_seed(seed)
    theta = 10. ** -torch.arange(4).float().repeat(2)
    r = page.Rotation(theta, 1.1, torch.arange(4).repeat(2), lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1))
    q, k, v = (torch.randn(1, 4, T, 10) for _ in range(3))
    at = torch.arange(T)
    want = dense_attention(rel, q, k, v, at, at, r, .3)
    old, page.BLOCK = page.BLOCK, block
    try: got = pieces(rel, q, k, v, at, r, sorted(min(c, T) for c in cuts))
    finally: page.BLOCK = old
    assert (got - want).abs().max() < 1e-4


FAR = [SelfExtend(128, 256), SelfExtend(64, 1024, log_n=4096), ReRoPE(128), LeakyReRoPE(512, 64.), STRING(16384, 128), DCA.of(256), DCA.of(4096), LMInfinite(256), DPE((1, 16, 64, 128), 128, pairs=4)]

@pytest.mark.parametrize('rel', FAR, ids=lambda r: r.name)
def test_dense_and_fast_agree_far_out(rel):
    "32,768 tokens in float32: the last queries, alone and in blocks, against the definition."
    torch.manual_seed(0)
    theta = 1e4 ** -(torch.arange(4).float() / 4).repeat(2)
    r = page.Rotation(theta, 1.1, torch.arange(4).repeat(2), lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1))
    N, some = 32_768, 24
    q, k, v = (s * torch.randn(1, 2, n, 10) for n, s in ((some, 3.), (N, 3.), (N, 1.)))
    at, module = torch.arange(N), SimpleNamespace(relative=page._InLayer(rel, r))
    want = dense_attention(rel, q, k, v, at[-some:], at, r, .3)
    for step in (some, 7, 1):
        got = torch.cat([relative_attention(module, q[:, :, i:i + step], k[:, :, :N - some + i + step], v[:, :, :N - some + i + step], None, .3, at[None, N - some + i:N - some + i + step])[0] for i in range(0, some, step)], 1)
        assert (got.transpose(1, 2) - want).abs().max() < 1e-4, step


@pytest.mark.parametrize('rel', FAR, ids=lambda r: r.name)
def test_only_the_edges_of_a_block_need_a_mask(rel, monkeypatch):
    "Keys under a mask grow with the block and not with the text; the other parts go to the kernel whole."
    r, N, masked, whole = page.Rotation(torch.ones(8), 1., torch.arange(4).repeat(2), lambda x: x), 6000, [], []
    def count(q, k, v, seen, scale, softcap):
        (whole if seen is None else masked).append(k.shape[2])
        return attend(q, k, v, seen, scale, softcap)
    monkeypatch.setattr(page, 'attend', count)
    q = torch.zeros(1, 1, N, 8)
    relative_attention(SimpleNamespace(relative=page._InLayer(rel, r)), q, q, q, None, 1., torch.arange(N)[None])
    assert sum(masked) < (7 if isinstance(rel, DCA) else 3) * N + 3 * page.BLOCK             # all of them would be 12 N; a block of dca may reach into two chunks
    masked.clear(); whole.clear()
    relative_attention(SimpleNamespace(relative=page._InLayer(rel, r)), q[:, :, -1:], q, q, None, 1., torch.tensor([[N - 1]]))
    assert not masked and whole                                                              # a token that is written needs none at all


@pytest.mark.parametrize('factor', [3., 7.25, 16.])
def test_fractions_are_exact_far_out(factor):
    m, n = 131_071, torch.arange(0, 130_000, 97)
    got = LeakyReRoPE(512, factor).distance(torch.tensor([m]), n)[0]
    assert (got - (512 + (m - n.double() - 512) / factor)).abs().max() < 1e-9


def test_channels_that_do_not_lie_side_by_side():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 40).transpose(2, 3) for _ in range(3))
    seen = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    for s in (None, seen):
        out, lse = attend(q, k, v, s, .3)
        want, ref = plain_attention(q, k, v, seen if s is not None else torch.ones_like(seen), .3)
        assert (out.double() - want).abs().max() < 1e-5 and (lse.double() - ref).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

@on_gpu
@pytest.mark.parametrize('dtype,eps', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-11)])
@pytest.mark.parametrize('d', [8, 64, 100, 128])
@pytest.mark.parametrize('queries', [1, 37, 256])
def test_gpu_attention_over_whole_stretches(dtype, eps, d, queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, d, device='cuda', dtype=dtype) for n in (queries, 531, 531))
    out, lse = attend(q, k, v, None, d**-.5)
    want, ref = plain_attention(q, k, v, torch.ones(queries, 531, dtype=torch.bool, device='cuda'), d**-.5)
    assert out.dtype == dtype and lse.shape == (2, 4, queries) and (out.double() - want).abs().max() < eps and (lse.double() - ref).abs().max() < max(eps, 1e-5)


@on_gpu
def test_gpu_models_equal_the_cpu():
    for kind in ('llama', 'mistral', 'qwen3', 'gemma2', 'gemma3', 'phi', 'cohere'):
        m, ids = model_of(kind), ids_of(2)
        there = copy.deepcopy(m).cuda()
        for rel in maps_for(m):
            with relative(m, rel): want = read(m, ids)
            with relative(there, rel):
                for step in (None, 1, 7): close(read(there, ids.cuda(), step).cpu(), want)


# ---------------------------------------------------------------------------------------------- models

V, T = 60, 72
BASE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, initializer_range=.3, bos_token_id=0, eos_token_id=1, pad_token_id=None)
YARN, LINEAR = dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, rope_theta=1e4), dict(rope_type='linear', factor=4., rope_theta=1e4)
LLAMA3 = dict(rope_type='llama3', factor=4., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32, rope_theta=1e4)
FACTORS = [1., 1.5, 2., 4.]
LONGROPE = dict(rope_type='longrope', short_factor=FACTORS, long_factor=FACTORS, attention_factor=1.3, factor=4., original_max_position_embeddings=32, rope_theta=1e4)
LAYERS = dict(sliding_window=12, layer_types=['sliding_attention', 'full_attention'])
KINDS = dict(llama=(LlamaConfig, {}), one_kv=(LlamaConfig, dict(num_key_value_heads=1)), no_gqa=(LlamaConfig, dict(num_key_value_heads=4)), mistral=(MistralConfig, dict(sliding_window=None)), qwen2=(Qwen2Config, {}),
             qwen2_sliding=(Qwen2Config, dict(use_sliding_window=True, max_window_layers=1, sliding_window=12)), qwen3=(Qwen3Config, dict(head_dim=8)), gemma=(GemmaConfig, dict(head_dim=8)),
             gemma2=(Gemma2Config, dict(head_dim=8, attn_logit_softcapping=2., query_pre_attn_scalar=5, **LAYERS)), gemma3=(Gemma3TextConfig, dict(head_dim=8, query_pre_attn_scalar=5, **LAYERS)),
             phi=(PhiConfig, dict(partial_rotary_factor=.5)), gpt_neox=(GPTNeoXConfig, dict(rotary_pct=.5)), cohere=(CohereConfig, {}), glm=(GlmConfig, dict(head_dim=8)), olmo2=(Olmo2Config, {}),
             linear=(LlamaConfig, dict(rope_parameters=LINEAR)), ntk=(LlamaConfig, dict(rope_parameters=dict(rope_type='default', rope_theta=1e4 * 4**(8 / 6)))), yarn=(LlamaConfig, dict(rope_parameters=YARN)),
             abf=(LlamaConfig, dict(rope_parameters=dict(rope_type='default', rope_theta=5e5))), llama3=(LlamaConfig, dict(rope_parameters=LLAMA3)), yarn_untruncated=(LlamaConfig, dict(rope_parameters=YARN | dict(truncate=False))),
             longrope=(LlamaConfig, dict(rope_parameters=LONGROPE)), yarn_cohere=(CohereConfig, dict(rope_parameters=YARN)))
INTERLEAVED = ('cohere', 'glm', 'yarn_cohere')
_made = {}


def model_of(kind):
    if kind not in _made:
        torch.manual_seed(0)
        config, kw = KINDS[kind]
        m = _made[kind] = AutoModelForCausalLM.from_config(config(**{**BASE, **kw}), dtype=torch.float32).eval()
        with torch.no_grad():
            for n, p in m.named_parameters():
                if 'proj' in n or 'query_key_value' in n: p.normal_(std=.4)           # so that attention is sharp and positions matter
    return _made[kind]


def ids_of(batch=1, T=T, seed=0): return torch.randint(2, V, (batch, T), generator=torch.Generator().manual_seed(seed))


def pairs_of(m): return page.frequencies(next(iter(page.rotary_modules(m).values())))[0].numel()


def scales(n, choice=(2, 1, 4, 8)): return tuple(choice[i * len(choice) // n] for i in range(n))


def maps_for(m):
    p = pairs_of(m)
    some = tuple(tuple(tuple(range((l + h) % 2, p, 2)) for h in range(4)) for l in range(2))
    return [SelfExtend(4, 8), ReRoPE(8), LeakyReRoPE(8, 4.), STRING(20, 4), DCA(12, 15), LMInfinite(10, 3), DPE(scales(p), 16, p), DPE(scales(p), 16, p, keep=some), ReRoPE(8, log_n=16), STRING(20, 4, 1.1)]


@torch.no_grad()
def read(m, ids, step=None, **kw):
    "Logits of all tokens, read `step` at a time."
    if step is None: return m(ids, use_cache=False, **kw).logits
    cache = DynamicCache(config=m.config)
    return torch.cat([m(ids[:, i:i + step], past_key_values=cache, use_cache=True).logits for i in range(0, ids.shape[1], step)], 1)


def close(a, b, eps=1e-4): assert (a - b).abs().max() < eps * max(1, b.abs().max().item()), f'{(a - b).abs().max():.2e}'


# The oracle: the model's own rotation is switched off, and attention is computed from the papers' definitions, pair by pair, in float64.

@functools.lru_cache(None)
def distances(rel, N, sliding_window, *which):
    r = [[rho(rel, x, y, *which) if y <= x and not (sliding_window and x - y >= sliding_window) else None for y in range(N)] for x in range(N)]
    return torch.tensor([[0. if u is None else u for u in x] for x in r], dtype=torch.float64), torch.tensor([[u is not None for u in x] for x in r])


def oracle_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, **kw):
    rel, config, layer, interleaved = ORACLE['rel'], module.config, module.layer_idx, ORACLE['interleaved']
    p = config.rope_parameters
    kind = None if 'rope_type' in p else config.layer_types[layer]
    p = p[kind] if kind else p
    if p['rope_type'] == 'default':
        d = int(getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads)
        d = int(d * p.get('partial_rotary_factor', 1.))
        theta, factor = [p['rope_theta']**(-2 * i / d) for i in range(d // 2)], 1.
    else:
        theta, factor = ROPE_INIT_FUNCTIONS[p['rope_type']](config, 'cpu', **(dict(layer_type=kind) if kind else {}))
        theta = theta.tolist()
    n, group, N = len(theta), query.shape[1] // key.shape[1], query.shape[2]
    if sliding_window: rel = RelativeMap()
    z = torch.zeros(*query.shape[:3], N, dtype=torch.float64)
    q, k, v = (x.double() for x in (query, key, value))
    for h in range(query.shape[1]):
        for i, t in enumerate(theta):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
            R, seen = distances(rel, N, sliding_window, *((i,) if isinstance(rel, DPE) else ()), *((layer, h) if getattr(rel, 'keep', None) else ()))
            qa, qb, ka, kb = (x[:, c, :, e].unsqueeze(u) for x, c, e, u in ((q, h, a, 2), (q, h, b, 2), (k, h // group, a, 1), (k, h // group, b, 1)))
            z[:, h] += factor**2 * ((R * t).cos() * (qa * ka + qb * kb) + (R * t).sin() * (qa * kb - qb * ka))
        z[:, h] += q[:, h, :, 2 * n:] @ k[:, h // group, :, 2 * n:].transpose(-1, -2)
    z = z * scaling * torch.tensor([sharp(ORACLE['rel'] if not sliding_window else RelativeMap(), x) for x in range(N)])[:, None]
    if softcap: z = softcap * torch.tanh(z / softcap)
    out = z.masked_fill(~seen, -math.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


ORACLE = {}
AttentionInterface.register('oracle_for_tests', oracle_attention)
AttentionMaskInterface.register('oracle_for_tests', lambda *a, **k: None)


def oracle(kind, rel, ids, monkeypatch):
    m = copy.deepcopy(model_of(kind))
    ORACLE.update(rel=rel, interleaved=kind in INTERLEAVED)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(m).__module__], 'apply_rotary_pos_emb', lambda q, k, *a, **kw: (q, k))
        m.set_attn_implementation('oracle_for_tests')
        return read(m, ids)


@pytest.mark.parametrize('kind', KINDS)
def test_a_map_that_changes_nothing_changes_nothing(kind, monkeypatch):
    m, ids = model_of(kind), ids_of(2)
    want = read(m, ids)
    close(oracle(kind, RelativeMap(), ids, monkeypatch), want)                                   # the oracle is one
    p = pairs_of(m)
    for rel in (RelativeMap(), SelfExtend(1, 8), SelfExtend(8, 2 * T + T % 8 + 8 - (2 * T + T % 8) % 8), LeakyReRoPE(8, 1.), STRING(8, 8), DCA(T, T), LMInfinite(T), ReRoPE(T), DPE((1,) * p, 8, p)):
        with relative(m, rel): close(read(m, ids), want, 2e-5); close(read(m, ids, 7), want, 2e-5)
    assert torch.equal(read(m, ids), want)


@pytest.mark.parametrize('kind', KINDS)
def test_every_map_on_every_architecture_equals_the_oracle(kind, monkeypatch):
    m, ids = model_of(kind), ids_of(2)
    plain = read(m, ids)
    for rel in maps_for(m):
        want = oracle(kind, rel, ids, monkeypatch)
        assert (want - plain).abs().max() > 1e-2, rel                                             # the map does something here
        with relative(m, rel):
            close(read(m, ids), want)
            for step in (1, 7, 40): close(read(m, ids, step), want)
            with monkeypatch.context() as patch:
                patch.setattr(page, 'BLOCK', 11); close(read(m, ids), want)
    assert torch.equal(read(m, ids), plain)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(['llama', 'qwen3', 'gemma3', 'gemma2']), st.integers(0, 9), st.lists(st.integers(1, T - 1), max_size=5), st.integers(1, T))
def test_any_chunking_and_any_length(kind, which, cuts, n):
    m, ids = model_of(kind), ids_of(2)[:, :n]
    ends = [0, *sorted({c for c in cuts if c < n}), n]
    with relative(m, maps_for(m)[which]), torch.no_grad():
        cache = DynamicCache(config=m.config)
        got = torch.cat([m(ids[:, i:j], past_key_values=cache).logits for i, j in zip(ends, ends[1:])], 1)
        close(got, read(m, ids))


@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gpt_neox'])
def test_crop_and_continue(kind):
    m, ids = model_of(kind), ids_of(2)
    for rel in maps_for(m):
        with relative(m, rel), torch.no_grad():
            cache = DynamicCache(config=m.config)
            m(torch.cat([ids[:, :40], ids[:, :20]], 1), past_key_values=cache)
            cache.crop(-20)
            close(m(ids[:, 40:], past_key_values=cache).logits, read(m, ids)[:, 40:])


@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen3', 'gemma2', 'gemma3', 'phi', 'cohere'])
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('positions', ['given', 'default'])
def test_padded_batches_equal_single_rows(kind, side, positions):
    m, sizes = model_of(kind), (T, 50, 13)
    rows = [ids_of(1, n, seed=n) for n in sizes]
    ids, mask = torch.full((3, T), 5), torch.zeros(3, T, dtype=torch.int64)
    for i, (r, n) in enumerate(zip(rows, sizes)):
        where = slice(T - n, T) if side == 'left' else slice(0, n)
        ids[i, where], mask[i, where] = r[0], 1
    for rel in [RelativeMap(), *maps_for(m)]:
        with relative(m, rel):
            for fill in (0, 1):
                kw = dict(position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, fill)) if positions == 'given' else {}
                got = read(m, ids, attention_mask=mask, **kw)
                for i, r in enumerate(rows): close(got[i][mask[i].bool()], read(m, r)[0])
                if positions == 'default': break


def test_a_padded_batch_in_chunks_and_decoding_behind_right_padding():
    m, a, b, more = model_of('llama'), ids_of(1, 40, 1), ids_of(1, 29, 2), ids_of(2, 6, 3)
    for rel in maps_for(m):
        with relative(m, rel), torch.no_grad():
            want = torch.cat([read(m, torch.cat([r, more[i:i + 1]], 1))[:, -6:] for i, r in enumerate((a, b))])
            for side in ('left', 'right'):
                pad, ones = torch.full((1, 11), 5), torch.ones(1, 29, dtype=torch.bool)
                ids = torch.cat([a, torch.cat([pad, b] if side == 'left' else [b, pad], 1)])
                mask = torch.cat([torch.ones(1, 40, dtype=torch.bool), torch.cat([~ones[:, :11], ones] if side == 'left' else [ones, ~ones[:, :11]], 1)])
                cache = DynamicCache(config=m.config)
                for i, j in ((0, 17), (17, 18), (18, 40)): m(ids[:, i:j], attention_mask=mask[:, :j], past_key_values=cache)
                got = []
                for i in range(6):
                    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
                    got.append(m(more[:, i:i + 1], attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache).logits)
                close(torch.cat(got, 1), want)


def test_a_chunk_of_nothing_but_padding():
    m, r = model_of('gemma3'), ids_of(1, 20)
    ids, mask = torch.cat([torch.full((1, 30), 5), r], 1), torch.cat([torch.zeros(1, 30), torch.ones(1, 20)], 1).long()
    ids, mask = torch.cat([ids, ids_of(1, 50, 4)]), torch.cat([mask, torch.ones(1, 50).long()])
    for rel in [RelativeMap(), *maps_for(m)]:
        with relative(m, rel), torch.no_grad():
            for both in (ids, ids[:1]):
                cache, out = DynamicCache(config=m.config), []
                for i in range(0, 50, 10): out.append(m(both[:, i:i + 10], attention_mask=mask[:len(both), :i + 10], past_key_values=cache).logits)
                close(torch.cat(out, 1)[:1, 30:], read(m, r))


def slow_greedy(m, ids, new):
    for _ in range(new): ids = torch.cat([ids, read(m, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize('kind', ['llama', 'qwen2_sliding', 'gemma3', 'gpt_neox'])
def test_generate_equals_recomputing_everything(kind):
    m = model_of(kind)
    a, b = ids_of(1, 40, 1), ids_of(1, 29, 2)
    batch = torch.cat([a, torch.cat([torch.full((1, 11), 5), b], 1)])
    mask = torch.ones_like(batch); mask[1, :11] = 0
    kw = dict(max_new_tokens=14, do_sample=False, pad_token_id=1, eos_token_id=None)
    for rel in maps_for(m):
        with relative(m, rel):
            want = torch.cat([slow_greedy(m, r, 14)[:, -14:] for r in (a, b)])
            assert torch.equal(m.generate(batch, attention_mask=mask, **kw)[:, -14:], want), rel
            assert torch.equal(m.generate(a, **kw, prefill_chunk_size=9)[:, -14:], want[:1])
            assert torch.equal(m.generate(a, **kw, use_cache=False)[:, -14:], want[:1])


def test_beam_search_reorders_the_cache_rightly():
    m, ids = model_of('llama'), ids_of(2, 40)
    kw = dict(max_new_tokens=8, do_sample=False, num_beams=3, pad_token_id=1, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    for rel in maps_for(m):
        with relative(m, rel):
            fast, slow = m.generate(ids, **kw), m.generate(ids, **kw, use_cache=False)
            assert torch.equal(fast.sequences, slow.sequences); close(fast.sequences_scores, slow.sequences_scores)
            logp = read(m, fast.sequences)[:, 39:-1].log_softmax(-1).gather(-1, fast.sequences[:, 40:, None]).sum((1, 2)) / 8
            close(fast.sequences_scores, logp)


def test_speculative_decoding_crops_the_cache_rightly():
    m, ids = model_of('llama'), torch.arange(2, 8).repeat(7)[None]
    for rel in maps_for(m):
        with relative(m, rel): assert torch.equal(m.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=1, eos_token_id=None), slow_greedy(m, ids, 12))


@pytest.mark.parametrize('rel', [SelfExtend(4, 16), DCA(20, 30), LMInfinite(24, 4), STRING(30, 6)])
@pytest.mark.parametrize('family', [0, 2])
def test_questions_under_a_map_equal_the_slow_way(rel, family):
    from test_answers import FAMILIES, Hidden, TOK, by_hand, model
    from pose_nb.answers import answer, make_trials
    m, task = model(*FAMILIES[family][:2], **FAMILIES[family][2]), Hidden(6)
    prompts = [t['prompt'] for t in make_trials(task, TOK, (50, 90), (0., 1.), trials=2, bos=0)]
    with relative(m, rel):
        slow = [by_hand(m, p, 6) for p in prompts]
        for batch_tokens, chunk in ((1, 7), (250, 2048)):
            for (reply, nll), got in zip(slow, answer(m, TOK, task, prompts, batch_tokens, chunk)): assert got['reply'] == reply and got['nll'] == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize('kind', ['llama', 'gemma3'])
def test_perplexity_under_a_map_equals_the_slow_way(kind):
    from pose_nb.perplexity import perplexity, windows
    m, docs = model_of(kind), [ids_of(1, n, n)[0].numpy() for n in (90, 71)]
    for rel in maps_for(m):
        with relative(m, rel):
            total = count = 0
            for d in docs:
                for b, e, s in windows(len(d), 48, 20):
                    x = torch.tensor(d[b:e])[None]
                    nll = torch.nn.functional.cross_entropy(read(m, x)[0, :-1], x[0, 1:], reduction='none')
                    keep = min(s, len(nll)); total += nll[-keep:].double().sum().item(); count += keep
            for chunk in (9, 1000): assert perplexity(m, docs, 48, stride=20, bos=False, chunk=chunk).rows[0].nll == pytest.approx(total / count, abs=1e-4)


# ---------------------------------------------------------------------------------------------- in and out of a model

def state(m):
    "Everything of a model that a map could leave behind."
    return (m.config.to_dict(), m.config._attn_implementation, [(n, sorted(k for k in vars(x) if not k.startswith('_')), len(x._forward_hooks), len(x._forward_pre_hooks), x.training) for n, x in m.named_modules()])


@pytest.mark.parametrize('attention', ['sdpa', 'eager', 'flex_attention'])
def test_set_and_clear_restore_everything(attention):
    m, ids, rel = copy.deepcopy(model_of('qwen3')), ids_of(), SelfExtend(4, 8)
    m.set_attn_implementation(attention)
    m.model.layers[1].mlp.train()                                  # mixed modes stay as they are
    run = attention != 'flex_attention'                            # (which compiles for a minute)
    before = state(m)
    if not run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page, '_first_logits', lambda model: torch.ones(1)); patch.setattr(page._Probe, 'asked', True)
            with relative(m, rel): assert m.config._attn_implementation == NAME
        assert state(m) == before
        return
    want = read(m, ids)
    with relative(m, rel): under = read(m, ids)
    again = lambda: state(m) == before and torch.equal(read(m, ids), want)
    assert again() and not torch.equal(under, want)
    set_relative(m, ReRoPE(8)); set_relative(m, rel)
    assert torch.equal(read(m, ids), under)
    assert clear_relative(m) is m and again()
    assert clear_relative(m) is m and again()
    set_relative(m, rel); set_relative(m, None); assert again()
    with pytest.raises(ZeroDivisionError):
        with relative(m, rel): read(m, ids); 1 / 0
    assert again()
    with pytest.raises(PoseError):
        with relative(m, DPE((1, 2), 8, 64)): pass
    assert again()
    with relative(m, ReRoPE(4)):
        outer = read(m, ids)
        with relative(m, rel): assert torch.equal(read(m, ids), under)
        assert torch.equal(read(m, ids), outer)
        with pytest.raises(PoseError):
            with relative(m, 'rerope'): pass
        assert torch.equal(read(m, ids), outer)
    assert again()


def test_a_failing_forward_pass_leaves_nothing_behind():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    want, before = read(m, ids), state(m)
    m.lm_head.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(PoseError, match='LlamaForCausalLM cannot take a relative map'): set_relative(m, ReRoPE(8))
    m.lm_head._forward_hooks.clear()
    assert state(m) == before and torch.equal(read(m, ids), want)


def test_saving_under_a_map_saves_the_plain_model(tmp_path):
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    want = read(m, ids)
    with relative(m, SelfExtend(4, 8)): m.save_pretrained(tmp_path)
    assert not any(NAME in p.read_text(errors='ignore') for p in tmp_path.glob('*.json'))
    assert torch.equal(read(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), want)


def test_copies_are_independent():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    plain = read(m, ids)
    with relative(m, SelfExtend(4, 8)):
        under, other = read(m, ids), copy.deepcopy(m)
        assert torch.equal(read(other, ids), under)
        assert torch.equal(read(clear_relative(other), ids), plain) and torch.equal(read(m, ids), under)
        other = set_relative(copy.deepcopy(m), ReRoPE(8))
        assert torch.equal(read(m, ids), under) and not torch.equal(read(other, ids), under)
    assert torch.equal(read(m, ids), plain)


def test_a_map_is_found_through_wrappers():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    plain = read(m, ids)
    with relative(m, SelfExtend(4, 8)): under = read(m, ids)
    set_relative(m.model, SelfExtend(4, 8)); assert torch.equal(read(m, ids), under)            # put into the inner model, taken out of the outer
    set_relative(m, ReRoPE(8)); clear_relative(m.model); assert torch.equal(read(m, ids), plain)
    from peft import LoraConfig, get_peft_model
    p = get_peft_model(m, LoraConfig(target_modules=['q_proj', 'v_proj'], r=2)).eval()
    with relative(p, SelfExtend(4, 8)): close(read(p, ids), under); close(p(ids).logits, under); close(read(p.get_base_model(), ids), under)
    assert torch.equal(read(p, ids), plain)
    set_relative(p, ReRoPE(8)); clear_relative(p.get_base_model()); assert torch.equal(read(p, ids), plain)


def test_two_models_at_once_and_one_model_between_batches():
    a, b, x, y = copy.deepcopy(model_of('llama')), copy.deepcopy(model_of('qwen3')), ids_of(1, 50, 1), ids_of(3, 20, 2)
    with relative(a, SelfExtend(4, 8)): wa = [read(a, x), read(a, y)]
    with relative(b, DCA(12, 15)): wb = read(b, x)
    with relative(a, SelfExtend(4, 8)), relative(b, DCA(12, 15)):
        assert torch.equal(read(a, x), wa[0]) and torch.equal(read(b, x), wb) and torch.equal(read(a, y), wa[1]) and torch.equal(read(a, x), wa[0])
        caches = [DynamicCache(config=a.config) for _ in range(2)]
        for i in range(0, 20, 5):                                                                    # texts take turns
            for c, r in zip(caches, (x, y)):
                with torch.no_grad(): got = a(r[:, i:i + 5], past_key_values=c).logits
        close(got, wa[1][:, 15:])


@settings(deadline=None, max_examples=25)
@given(maps(), st.integers(1, 40), st.sampled_from([7, 256]))
def test_gradients_of_the_fast_path_are_those_of_the_definition(rel, T, block):
    torch.manual_seed(T)
    r = page.Rotation(10. ** -torch.arange(4).float().repeat(2), 1.1, torch.arange(4).repeat(2), lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1))
    q, k, v = (torch.randn(1, 4, T, 10, dtype=torch.float64, requires_grad=True) for _ in range(3))
    at, up, old = torch.arange(T), torch.randn(1, 4, T, 10, dtype=torch.float64), page.BLOCK
    want = torch.autograd.grad((dense_attention(rel, q, k, v, at, at, r, .3) * up).sum(), (q, k, v))
    page.BLOCK = block
    try: got = torch.autograd.grad((pieces(rel, q, k, v, at, r, []) * up).sum(), (q, k, v))
    finally: page.BLOCK = old
    for a, b in zip(got, want): assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max())


@pytest.mark.parametrize('kind', ['llama', 'gemma2'])
def test_gradients_are_right(kind):
    ids = ids_of(2, 40)
    m = copy.deepcopy(model_of(kind)).double(); m.model.rotary_emb = type(m.model.rotary_emb)(config=m.config)
    for rel in maps_for(m):
        with relative(m, rel):
            m.train(); m.zero_grad()
            m(ids, use_cache=False).logits.log_softmax(-1)[..., 3].mean().backward()
            for name in ('model.layers.0.self_attn.k_proj.weight', 'model.layers.1.self_attn.q_proj.weight', 'model.layers.0.self_attn.v_proj.weight'):
                p = m.get_parameter(name); d = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
                with torch.no_grad():
                    def at(e):
                        p.add_(d, alpha=e); out = m(ids, use_cache=False).logits.log_softmax(-1)[..., 3].mean().item(); p.sub_(d, alpha=e); return out
                    steps = [(at(e) - at(-e)) / 2 / e for e in (1e-3, 5e-4)]     # (norms compute in float32: no smaller ones)
                    slope = (4 * steps[1] - steps[0]) / 3
                assert (p.grad * d).sum().item() == pytest.approx(slope, rel=1e-2, abs=1e-3), (rel, name)
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    m, ids, grads = copy.deepcopy(model_of('llama')).train(), ids_of(2, 40), []
    with relative(m, SelfExtend(4, 8)):
        for on in (False, True):
            if on: m.gradient_checkpointing_enable()
            m.zero_grad(); m(ids, labels=ids, use_cache=False).loss.backward(); grads.append(m.model.layers[0].self_attn.k_proj.weight.grad.clone())
    close(*grads)


@pytest.mark.parametrize('dtype,eps', [(torch.bfloat16, .1), (torch.float16, .02), (torch.float64, 1e-4)])
def test_other_precisions(dtype, eps):
    for kind in ('llama', 'gemma2'):
        m, ids = copy.deepcopy(model_of(kind)), ids_of()
        want = {}
        for rel in maps_for(m):
            with relative(m, rel): want[rel] = read(m, ids)
        for p in m.parameters(): p.data = p.data.to(dtype)
        for rel, w in want.items():
            with relative(m, rel):
                got = read(m, ids)
                assert got.dtype == dtype and (got.float() - w).abs().mean() < eps * w.abs().mean(), rel
                if dtype == torch.float64: close(read(m, ids, 7), got, 1e-5)


@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma2', 'cohere', 'glm', 'olmo2'])
def test_autocast(kind):
    m, ids = copy.deepcopy(model_of(kind)), ids_of()
    for rel in maps_for(m):
        with relative(m, rel):
            want = read(m, ids)
            with torch.autocast('cpu', torch.bfloat16):
                for step in (None, 7): assert (read(m, ids, step).float() - want).abs().mean() < .1 * want.abs().mean(), rel
    with torch.autocast('cpu', torch.bfloat16), relative(m, ReRoPE(8)): read(m, ids)             # put in under autocast


# ---------------------------------------------------------------------------------------------- what is refused

def refused(says, f):
    with pytest.raises(PoseError, match=says) as e: f()
    assert '\n' not in str(e.value) and str(e.value).endswith('.')


def test_models_that_a_map_does_not_fit_are_refused_and_left_alone():
    ids = ids_of()
    make = lambda config: AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cases = [(make(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=V, bos_token_id=0, eos_token_id=1)), ReRoPE(8), 'no rotary embedding'),
                 (make(LlamaConfig(**BASE, rope_parameters=dict(rope_type='dynamic', factor=2., rope_theta=1e4))), ReRoPE(8), 'frequencies change with the length'),
                 (make(LlamaConfig(**BASE, rope_parameters=LONGROPE | dict(long_factor=[2.] * 4))), ReRoPE(8), 'frequencies change with the length'),
                 (make(MistralConfig(**BASE, sliding_window=12)), ReRoPE(8), 'set sliding_window to None'),
                 (make(LlamaConfig(**BASE)), DPE((1, 2), 8, 64), 'heads of 64 pairs, and the model.s have 4'),
                 (make(LlamaConfig(**BASE)), DPE((1, 2), 8, 4, keep=(((0,),) * 4,)), 'another number of layers or heads'),
                 (make(LlamaConfig(**BASE)), DPE((1, 2), 8, 4, keep=(((0,),) * 3,) * 2), 'another number of layers or heads'),
                 (make(LlamaConfig(**BASE)), 'self_extend', 'a relative map is expected'), (make(LlamaConfig(**BASE)), SelfExtend, 'a relative map is expected')]
    for m, rel, says in cases:
        want, before = read(m, ids), state(m)
        refused(says, lambda: set_relative(m, rel))
        assert state(m) == before and torch.equal(read(m, ids), want)


# MLA, sinks, layers without rotation, attention of their own, positions that do not arrive: a map that changes nothing would change something
REFUSED = 'cohere2 deepseek_v2 deepseek_v3 exaone4 falcon gemma3n_text glm4_moe_lite gpt_oss granitemoehybrid llama4_text minicpm3 moshi persimmon recurrent_gemma smollm3'.split()
FITS = 'arcee cohere ernie4_5 gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_neox gptj codegen granite helium llama mixtral nemotron olmo2 olmo3 phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss stablelm starcoder2'.split()

@pytest.mark.parametrize('kind', REFUSED + FITS)
def test_an_architecture_fits_in_full_or_is_refused(kind):
    m, ids = tiny_model(kind), torch.randint(5, 60, (2, 70), generator=torch.Generator().manual_seed(0))
    want, before = read(m, ids), state(m)
    if kind in REFUSED: refused('such as Llama|work on Llama|are for models with one', lambda: set_relative(m, RelativeMap()))
    else:
        with relative(m, RelativeMap()): close(read(m, ids), want)
        with relative(m, SelfExtend(4, 8)): assert (read(m, ids) - want).abs().max() > 1e-3
    assert state(m) == before and torch.equal(read(m, ids), want)


def test_requests_that_a_map_would_answer_wrongly_are_refused():
    m, ids, n = copy.deepcopy(model_of('llama')), ids_of(2, 50), torch.arange(50)[None]
    with relative(m, SelfExtend(4, 8)), torch.no_grad():
        want = read(m, ids)
        count = 'position_ids must count the tokens'
        refused(count, lambda: m(ids, position_ids=torch.where(n < 20, n, n + 100)))                        # PoSE's skip
        refused(count, lambda: m(ids, position_ids=n + 7))
        refused(count, lambda: m(ids, position_ids=n % 25))                                                 # packed texts
        refused(count, lambda: m(ids, position_ids=torch.cat([n, 2 * n])))
        refused(count, lambda: m(ids, position_ids=n.flip(1)))
        cache = DynamicCache(config=m.config); m(ids[:, :20], past_key_values=cache)
        refused(count, lambda: m(ids[:, 20:], position_ids=n[:, 20:] + 9, past_key_values=copy.deepcopy(cache)))   # a skip between two parts
        refused(count, lambda: m(ids[:, 20:], position_ids=n[:, :30], past_key_values=copy.deepcopy(cache)))       # starts again
        close(m(ids[:, 20:], position_ids=n[:, 20:], past_key_values=copy.deepcopy(cache)).logits, want[:, 20:])
        refused('attention_mask has 30 columns for 50 tokens', lambda: m(ids[:, 20:], attention_mask=torch.ones(2, 30), past_key_values=copy.deepcopy(cache)))
        refused('not one of queries and keys', lambda: m(ids, attention_mask=torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()))
        refused('a cache that grows', lambda: m.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation='static', pad_token_id=1))
        close(m(inputs_embeds=m.get_input_embeddings()(ids)).logits, want)
        close(m(ids, attention_mask=torch.ones(2, 50)).logits, want); close(m(ids, position_ids=n.repeat(2, 1)).logits, want)
    from pose_nb.model import feed_positions
    with relative(m, SelfExtend(4, 8)):
        kw = feed_positions(m, n / 2.)
        refused('counts whole positions', lambda: m(ids, **kw))
        feed_positions(m, None); close(read(m, ids), want)
    with relative(m, SelfExtend(4, 8)):
        m.set_attn_implementation('eager'); refused('attention was changed', lambda: m(ids))
    close(read(m, ids), read(model_of('llama'), ids))
    m = AutoModelForCausalLM.from_config(LlamaConfig(**BASE, attention_dropout=.1)).train()
    with relative(m, ReRoPE(8)): refused('no attention dropout', lambda: m(ids)); m.eval(); m(ids)


def test_a_compiled_model_takes_a_map_and_gives_it_back():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    plain = read(m, ids)
    with relative(m, SelfExtend(4, 8)): want = read(m, ids)
    compiled = torch.compile(m, backend='eager')
    for target in (m, compiled):
        close(read(compiled, ids), plain)
        with relative(target, SelfExtend(4, 8)): close(read(compiled, ids), want)
        close(read(compiled, ids), plain)


# ---------------------------------------------------------------------------------------------- models that see images, other masks, shared configs

def seeing_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=12, max_position_embeddings=64,
                layer_types=['sliding_attention', 'full_attention'], initializer_range=.3, pad_token_id=None, bos_token_id=0, eos_token_id=1)
    eye = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eye, mm_tokens_per_image=4, image_token_index=50, boi_token_index=51, eoi_token_index=52)).eval()


def test_a_model_that_sees_images_reads_text_under_a_map_and_refuses_images():
    m, ids = seeing_model(), torch.randint(5, 45, (1, 40), generator=torch.Generator().manual_seed(0))
    m.set_attn_implementation({'text_config': 'eager', 'vision_config': 'sdpa'})
    codes = lambda: (m.config._attn_implementation, m.config.text_config._attn_implementation, m.config.vision_config._attn_implementation)
    before, plain = codes(), m(ids).logits
    with relative(m, RelativeMap()): close(m(ids).logits, plain); assert codes() == (before[0], NAME, 'sdpa')
    with relative(m, ReRoPE(8)): assert (m(ids).logits - plain).abs().max() > .1
    assert codes() == before and torch.equal(m(ids).logits, plain)
    ids[0, 10:14] = 50
    image = dict(pixel_values=torch.randn(1, 3, 28, 28), token_type_ids=(ids == 50).long())
    plain = m(ids, **image).logits
    with relative(m, RelativeMap()): refused('some tokens see later ones', lambda: m(ids, **image))
    with relative(m.model.language_model, RelativeMap()): refused('some tokens see later ones', lambda: m(ids, **image))
    assert torch.equal(m(ids, **image).logits, plain)


def test_a_hole_in_the_mask_needs_positions_that_count_without_it():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    mask = torch.ones_like(ids); mask[:, 10:15] = 0
    count = (mask.cumsum(1) - 1).clamp(min=0)
    want = m(ids, attention_mask=mask, position_ids=count).logits
    with relative(m, RelativeMap()):
        close(m(ids, attention_mask=mask, position_ids=count).logits[:, 15:], want[:, 15:])
        refused('pad at the ends only', lambda: m(ids, attention_mask=mask))
        refused('pad at the ends only', lambda: m(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]))


def test_what_a_map_cannot_give_is_said():
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    other = type(m)(m.config)
    with relative(m, ReRoPE(8)):
        refused('some tokens see later ones', lambda: m(ids, is_causal=False))
        refused('leave output_attentions away', lambda: m(ids, output_attentions=True))
        refused('shares its config object', lambda: other(ids))
        refused('shares its config object', lambda: set_relative(other, ReRoPE(8)))
    other(ids)
    refused('a transformers model is expected', lambda: set_relative(None, ReRoPE(8)))


def test_a_text_beyond_the_reach_is_told_once():
    m = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)).eval()
    for rel, reach in ((SelfExtend(2, 32), 96), (SelfExtend(2, 512), 64), (ReRoPE(8), None), (RelativeMap(), None)):
        with relative(m, rel), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            m(torch.arange(64)[None])
            assert not said
            for _ in range(2): m(torch.arange(130)[None] % 64)
        assert [f'reaches {reach} tokens' in str(w.message) for w in said] == [True] * (reach is not None)


def test_pairs_of_equal_frequency_keep_their_places():
    m = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))
    rotary = m.model.rotary_emb
    rotary.inv_freq[3] = rotary.inv_freq[4]
    assert ask_rotation(rotary, m.model.layers[0].self_attn).pair.tolist() == [*range(8)] * 2
    for kind, want in (('llama', [0, 1, 2, 3] * 2), ('cohere', [0, 0, 1, 1, 2, 2, 3, 3])):             # halves; neighbours
        m = model_of(kind)
        assert ask_rotation(next(iter(page.rotary_modules(m).values())), next(a for a in m.modules() if type(a).__name__.endswith('Attention'))).pair.tolist() == want


def test_kept_pairs_of_a_model_whose_layers_are_not_all_attention():
    from pose_nb.dpe import attention_shape, key_pairs
    m, ids = tiny_model('qwen3_next'), torch.randint(5, 60, (1, 70))
    shape = attention_shape(m)
    keep = key_pairs(m, [ids[0].numpy()] * 2, max(1, shape['pairs'] // 2), (32, 64))
    assert len(keep) == shape['layers'] < m.config.num_hidden_layers
    with relative(m, DPE((2,), 16, shape['pairs'], keep)): a, b = m(ids).logits, read(m, ids, 9)
    close(a, b)


def test_a_model_with_a_map_is_pickled(tmp_path):
    m, ids = copy.deepcopy(model_of('llama')), ids_of()
    with relative(m, ReRoPE(8)):
        torch.save(m, tmp_path/'m.pt')
        assert torch.equal(torch.load(tmp_path/'m.pt', weights_only=False)(ids).logits, m(ids).logits)


# ---------------------------------------------------------------------------------------------- memory

def small_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)).eval()


def peak_of_reading(T, rel):
    "Most bytes of all tensors while T tokens are read at once."
    m, ids = small_model(), torch.randint(0, 512, (1, T))
    with torch.inference_mode(), relative(m, rel): return bench.peak_of_tensors(lambda: m(ids, logits_to_keep=1))


@pytest.mark.parametrize('rel', [SelfExtend(8, 128), LeakyReRoPE(64, 16.), STRING(2048, 128), DCA(96, 128), LMInfinite(64), DPE((1, 2, 4, 8), 128, 8)], ids=lambda r: type(r).__name__)
def test_memory_is_linear(rel):
    some, more = (peak_of_reading(n, rel) for n in (4096, 16384))
    assert more < 5 * some, (some, more)                          # four times the tokens; squares would be 16


PROBE = """
import torch, pathlib
from pose_nb.relative import *
from test_relative import small_model
m, ids = small_model(), torch.randint(0, 512, (1, 32768))
set_relative(m, SelfExtend(8, 128))
with torch.inference_mode(): out = m(ids, logits_to_keep=1).logits
assert torch.isfinite(out).all()
print(next(l for l in pathlib.Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')).split()[1])
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads the peak from /proc')
def test_32k_tokens_fit_in_4_gib():
    out = subprocess.run([sys.executable, '-c', PROBE], capture_output=True, text=True, timeout=600, cwd=os.path.dirname(__file__))
    assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout.split()[-1]) < 4 * 2**20                               # KiB; the whole process


def test_new_frequencies_are_refused_while_a_map_is_in():
    from conftest import make_model
    from pose_nb.interpolation import Linear
    from pose_nb.model import set_scaling
    m = make_model()
    with relative(m, ReRoPE(8)), pytest.raises(PoseError, match='clear_relative'): set_scaling(m, Linear(4.), 256)
    assert set_scaling(m, Linear(4.), 256).config.max_position_embeddings == 256
