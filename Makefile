# Everything a person runs: make demo, make bench, make test. Each makes .venv by itself.

PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
IN := $(VENV)/bin/
CONSTRAINTS := constraints.txt

.PHONY: demo bench test rehearsal test-all test-compat fuzz mutants survival damage processes security reliability lint clean

demo: $(VENV)/installed
	$(IN)python -m visattn demo

# A quick look at speed on this machine: a table, pictures and every row in runs/bench.
bench: $(VENV)/installed
	rm -rf runs/bench
	$(IN)python -m bench run --quick --suite cifar models --provider naive sdpa visattn
	$(IN)python -m bench report runs/bench

test: lint
	$(IN)python -m pytest -n 2 -m "not full"
	TRITON_INTERPRET=1 $(IN)python -m pytest -n 2 -m "kernels and not full"

# What runs where a GPU is at hand, without one: every stage starts and ends.
rehearsal: $(VENV)/installed
	PYTHON=$(IN)python bash bench/on_gpu.sh "$$(mktemp -d)" --dry-run

# The long form: every kernel × configuration × dtype × device, ahead of time.
test-all: lint
	$(IN)python -m pytest -n 2
	TRITON_INTERPRET=1 $(IN)python -m pytest -n 2 -m kernels

# The oldest supported versions; Triton 3.6's interpreter needs numpy < 2.4.
test-compat: $(COMPAT)/installed
	$(COMPAT)/bin/python -m pytest -n 2 -m "not full"
	TRITON_INTERPRET=1 $(COMPAT)/bin/python -m pytest -n 2 -m "kernels and not full"

# Random calls against float64; a mismatch is printed as the line that repeats it.
fuzz: N ?= 10000
fuzz: SEED ?= 0
fuzz: $(VENV)/installed
	$(IN)python -m tests.reliability.fuzzing --cases $(N) --seed $(SEED)

# Faults seeded into a copy of the tree, one at a time: the test named for each has to find it.
mutants: $(VENV)/installed
	$(IN)python -m tests.reliability.mutants

# Attempts to break training: killed, starved of disk, lied to, in several processes; and what it may touch.
survival damage processes security: $(VENV)/installed
	$(IN)python -m tests.reliability $@

lint: $(VENV)/installed
	$(IN)ruff check .
	$(IN)ruff format --check .
	$(IN)mypy

# Every attempt to break the package, and one table of what came of them.
reliability: $(VENV)/installed
	$(IN)python -m tests.reliability

# torch and torchvision come as the CUDA build of the registry; it runs on a CPU as well.
$(VENV)/installed: setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(IN)python -m pip install --quiet --constraint $(CONSTRAINTS) setuptools wheel
	$(IN)python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable ".[train,dev,test-models]"
	touch $@

$(COMPAT)/installed: setup.py pyproject.toml constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-compat.txt setuptools wheel
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-compat.txt --no-build-isolation --editable ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT) build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
