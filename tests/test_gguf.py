"""The metadata with which llama.cpp rotates as intended. Whether it does is in test_engines.py."""
import gguf, numpy as np, pytest
from gguf_writer import write_gguf

from pose_nb.export import patch_checkpoint
from pose_nb.interpolation import Linear, NTK, YaRN, YaRNRevised
from pose_nb.model import default_base


def fields(path):
    r = gguf.GGUFReader(path)
    return {k.removeprefix('llama.'): v.contents() for k, v in r.fields.items()}, {t.name: t.data for t in r.tensors}


@pytest.mark.parametrize('scheme', [Linear(8), YaRN(8), NTK(8), YaRNRevised(8)], ids=lambda s: s.name)
def test_metadata_says_the_scheme(scheme, tmp_path):
    write_gguf(patch_checkpoint(default_base(), scheme, 2048, tmp_path/'m'), tmp_path/'m.gguf')
    f, tensors = fields(tmp_path/'m.gguf')
    assert f['context_length'] == 2048 and f['rope.dimension_count'] == 32
    assert f['rope.freq_base'] == pytest.approx(1000. * (8 ** (32 / 30) if scheme.name == 'ntk' else 1), rel=1e-6)
    assert f.get('rope.scaling.type') == dict(linear='linear', yarn='yarn').get(scheme.name) and f.get('rope.scaling.factor') == (8. if scheme.name in ('linear', 'yarn') else None)
    assert f.get('rope.scaling.original_context_length') == (256 if scheme.name == 'yarn' else None)
    if scheme.name == 'yarn_revised':
        assert np.allclose(tensors['rope_freqs.weight'], scheme.ratio(32, 1000., 256)) and f['rope.scaling.attn_factor'] == pytest.approx(scheme(32, 1000., 256)[1])
    else: assert 'rope_freqs.weight' not in tensors
