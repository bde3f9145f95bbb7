# Two commands: `make demo` and `make test`. Each makes .venv with the pinned packages of constraints.txt if need be.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= runs/demo
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint aot bench gpu clean

install: $(INSTALLED)

demo: $(INSTALLED)
	$(VENV)/bin/bpo-fast demo --output_dir $(DEMO_OUT)

# A process a core, each of one thread.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

aot: $(INSTALLED)
	$(VENV)/bin/python -m bpo_fast.kernels.aot

bench: $(INSTALLED)
	$(VENV)/bin/python bench/throughput.py
	$(VENV)/bin/python bench/losses.py
	$(VENV)/bin/python bench/losses.py --sweep
	$(VENV)/bin/python bench/scoring.py
	$(VENV)/bin/python bench/noise.py
	$(VENV)/bin/python bench/noise.py --dtype bfloat16
	$(VENV)/bin/python bench/tables.py

# Proves and measures all on a GPU, in stages: `make gpu`, one by one `make gpu STAGE=noise`, with a Python that has
# torch and no .venv `make gpu PYTHON=python3`; on a CPU at toy sizes `make gpu REHEARSE=1`.
ifeq ($(origin PYTHON),command line)
gpu:
	$(PYTHON) bench/gpu.py $(if $(STAGE),--stage $(STAGE)) $(if $(REHEARSE),--rehearse)
else
gpu: $(INSTALLED)
	$(VENV)/bin/python bench/gpu.py $(if $(STAGE),--stage $(STAGE)) $(if $(REHEARSE),--rehearse)
endif

# The stamp is newer than what the extension and the dependencies are made from, or the install runs again.
$(INSTALLED): pyproject.toml setup.py constraints.txt kernels/architectures.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info bpo_fast/_C.*.so
