"""Every rotating architecture of transformers either extends in full or is refused with a reason; nothing is half applied."""
import copy

import pytest, torch

from pose_nb.architectures import architecture_row, logits_at, rope_model_types, tiny_model, verdict, _dense
from pose_nb.common import PoseError
from pose_nb.export import add_older_keys
from pose_nb.interpolation import LongRoPE, NTK, YaRN, YaRNRevised
from pose_nb.model import REFUSED, load_model, rope_info, set_scaling
from pose_nb.rope_config import rotary_dim

TYPES = rope_model_types()
MUST = 'llama mistral mixtral qwen2 qwen3 gemma2 gemma3_text phi gpt_neox gptj codegen falcon stablelm olmo2 cohere granite starcoder2 smollm3 glm deepseek_v3'.split()
REASONS = {**{t: why for t, why in REFUSED.items()}, **dict.fromkeys(['gemma4_text', 'gemma4_unified_text', 'lfm3'], "rope_type 'proportional'"), 'ministral3': 'something besides RoPE',
           **dict.fromkeys(['phi3', 'phi4_multimodal', 'phimoe'], 'cannot express dynamic'), 'dbrx': 'logits differ by', 'modernbert-decoder': 'post-processes its logits'}


@pytest.mark.parametrize('kind', TYPES)
def test_everything_works_or_the_reason_is_known(kind):
    says = verdict(architecture_row(kind))
    assert REASONS.get(kind, '') in says and bool(says) == (kind in REASONS), says


def test_the_families_that_must_work_are_there(): assert set(MUST) <= set(TYPES) - set(REASONS)


@pytest.mark.parametrize('kind', [t for t in TYPES if t not in REASONS])
def test_keys_for_older_readers_change_nothing_in_transformers_5(kind, tmp_path):
    for s in (NTK(2), YaRN(2), YaRNRevised(2)):
        model = tiny_model(kind)
        info = rope_info(model)
        assert rotary_dim(model.config) == info.dim
        set_scaling(model, s, 2 * info.original)
        model.save_pretrained(tmp_path/s.name); add_older_keys(tmp_path/s.name)
        again = load_model(tmp_path/s.name, torch.float32, device='cpu')
        assert torch.equal(logits_at(model, 2 * _dense()), logits_at(again, 2 * _dense())) and rope_info(again) == rope_info(model)


@pytest.mark.parametrize('kind', REFUSED)
def test_refused_by_name_before_any_weight_is_read(kind, tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(PoseError, match='cannot be extended'): load_model(tmp_path)


@pytest.mark.parametrize('kind', ['granite_swa', 'blt', 'lfm3', 'phimoe'])
def test_a_scheme_that_is_not_taken_up_leaves_the_model_alone(kind):
    model = tiny_model(kind)
    before, config = logits_at(model, _dense()), copy.deepcopy(model.config.to_dict())
    bad = LongRoPE(2, [1.] * 3) if kind == 'phimoe' else YaRN(2)
    with pytest.raises(PoseError): set_scaling(model, bad, 2 * 64)
    assert model.config.to_dict() == config and torch.equal(before, logits_at(model, _dense()))
