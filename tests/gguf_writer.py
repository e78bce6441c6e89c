"""Write a Llama checkpoint as GGUF, with the metadata keys that llama.cpp reads for RoPE. Only for tests: real conversions are llama.cpp's job."""
from pathlib import Path

import gguf, numpy as np, torch
from transformers import AutoModelForCausalLM

NAMES = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output', 'model.layers.': 'blk.', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
         'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down',
         'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm'}


def interleaved(w, heads):
    "Rows of a query or key weight in llama.cpp's order: the two channels of a pair side by side."
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def add_rope(g, config):
    "RoPE metadata as llama.cpp's converter writes it; a list of ratios (longrope with equal lists) becomes a tensor, which the converter cannot do."
    p, dim = config.rope_parameters, config.head_dim
    g.add_context_length(config.max_position_embeddings); g.add_rope_dimension_count(dim); g.add_rope_freq_base(p['rope_theta'])
    kind = p['rope_type']
    if kind in ('linear', 'yarn'):
        g.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == 'linear' else gguf.RopeScalingType.YARN)
        g.add_rope_scaling_factor(p['factor'])
    if kind == 'yarn': g.add_rope_scaling_orig_ctx_len(p['original_max_position_embeddings'])
    if kind == 'longrope':
        assert p['short_factor'] == p['long_factor'], 'a GGUF holds one list'
        g.add_tensor('rope_freqs.weight', np.array(p['long_factor'], np.float32))
        g.add_rope_scaling_attn_factors(p['attention_factor'])


def write_gguf(folder, path):
    "The checkpoint in `folder` as a GGUF without vocabulary."
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c, g = model.config, gguf.GGUFWriter(str(path), 'llama')
    g.add_block_count(c.num_hidden_layers); g.add_embedding_length(c.hidden_size); g.add_feed_forward_length(c.intermediate_size); g.add_head_count(c.num_attention_heads)
    g.add_head_count_kv(c.num_key_value_heads); g.add_layer_norm_rms_eps(c.rms_norm_eps); g.add_vocab_size(c.vocab_size); g.add_tokenizer_model('no_vocab')
    g.add_key_length(c.head_dim); g.add_value_length(c.head_dim)
    add_rope(g, c)
    for name, w in model.state_dict().items():
        if name == 'lm_head.weight' and c.tie_word_embeddings: continue
        w = w.numpy()
        if 'q_proj' in name: w = interleaved(w, c.num_attention_heads)
        if 'k_proj' in name: w = interleaved(w, c.num_key_value_heads)
        for old, new in sorted(NAMES.items(), key=lambda x: -len(x[0])): name = name.replace(old, new)
        g.add_tensor(name, np.ascontiguousarray(w))
    g.write_header_to_file(); g.write_kv_data_to_file(); g.write_tensors_to_file(); g.close()
    return Path(path)
