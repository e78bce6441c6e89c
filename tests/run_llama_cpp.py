"""Logits of a GGUF by llama.cpp: python run_llama_cpp.py MODEL.gguf TOKENS.npy LOGITS.npy (with llama-cpp-python installed)."""
import sys

import numpy as np
from llama_cpp import Llama

tokens = np.load(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False)   # float32 keys and values
model.eval(tokens.tolist())
np.save(sys.argv[3], np.array(model.scores[:len(tokens)]))
