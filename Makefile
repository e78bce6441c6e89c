# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN    := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export DS_BUILD_OPS ?= 0
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

.PHONY: demo test test-engines soak notebooks bench docs clean

.venv/installed: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Extend the embedded model from 256 to 2,048 tokens, offline, and show that it worked.
demo: .venv/installed
	$(BIN)/pose_nb demo

# Export in sync, notebooks clean, every notebook cell, every test.
test: .venv/installed
	$(BIN)/python tests/check_notebooks.py
	$(BIN)/python tests/make_readme.py --check
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q --durations=15 tests

# Opt-in: compare with older transformers and with llama.cpp, each in an environment of its own below .engines (minutes; llama.cpp is compiled).
.engines/transformers-%/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==$* numpy
	touch $@
.engines/llama-cpp/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check llama-cpp-python==0.3.36 numpy
	touch $@
test-engines: .venv/installed .engines/transformers-4.57.3/installed .engines/transformers-4.46.3/installed .engines/llama-cpp/installed
	POSE_NB_ENGINES=$(CURDIR)/.engines $(BIN)/python -m pytest -q tests/test_engines.py

# Opt-in: kill runs at random moments and compare them with runs that nobody kills (about half an hour); the result goes to tests/soak.txt.
KILLS ?= 200
SEED  ?= 0
soak: .venv/installed
	$(BIN)/python tests/soak.py --kills $(KILLS) --seed $(SEED) --out tests/soak.txt

# Run notebooks in place and keep their outputs: make notebooks NB=nbs/00_rope.ipynb (add FLAGS=+slow for slow cells).
NB ?= $(sort $(wildcard nbs/*.ipynb))
notebooks: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/python tests/execute_notebooks.py $(FLAGS) $(NB)
	$(BIN)/nbdev_clean
	$(BIN)/python tests/make_readme.py

# Ratios of time and memory, measured in one run.
bench: .venv/installed
	$(BIN)/python tests/bench/bench.py

# The site; needs Quarto (https://quarto.org).
docs: .venv/installed
	$(BIN)/nbdev_docs

clean:
	rm -rf .venv .engines _docs _proc build dist *.egg-info pose_nb_demo
