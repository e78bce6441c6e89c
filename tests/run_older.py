"""What the installed transformers makes of checkpoints: python run_older.py TARGET FOLDER...   Writes FOLDER-VERSION.npz, with a text `error` where it stops."""
import sys

import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()


def run(folder, target):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    AutoTokenizer.from_pretrained(folder)
    ids, pos = torch.arange(48)[None] + 2, torch.arange(target - 48, target)[None]
    with torch.no_grad(): logits = model(ids, position_ids=pos, attention_mask=torch.ones_like(ids)).logits
    rotary = getattr(model.base_model, 'rotary_emb', None) or next(m for m in model.modules() if type(m).__name__.endswith('RotaryEmbedding'))
    return dict(inv_freq=rotary.inv_freq.double().numpy(), attention=getattr(rotary, 'attention_scaling', 1.), logits=logits.numpy())


for folder in sys.argv[2:]:
    try: found = run(folder, int(sys.argv[1]))
    except Exception as e: found = dict(error=f'{type(e).__name__}: {e}')
    np.savez(f'{folder}-{transformers.__version__}.npz', **found)
