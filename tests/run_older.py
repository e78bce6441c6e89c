"""What the installed transformers makes of a checkpoint: python run_older.py FOLDER TARGET OUT.npz"""
import sys

import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, target, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
transformers.logging.set_verbosity_error()
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(folder)
ids, pos = torch.arange(48)[None] + 2, torch.arange(target - 48, target)[None]
with torch.no_grad(): logits = model(ids, position_ids=pos, attention_mask=torch.ones_like(ids)).logits
rotary = getattr(model.base_model, 'rotary_emb', None) or next(m for m in model.modules() if type(m).__name__.endswith('RotaryEmbedding'))
np.savez(out, inv_freq=rotary.inv_freq.double().numpy(), attention=getattr(rotary, 'attention_scaling', 1.), logits=logits.numpy(), version=transformers.__version__)
