# Two commands are all a newcomer needs: `make demo` and `make test`. Both install on first use, and only then.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMALL := requirements/models.txt
LOCK := requirements/lock.txt

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-fast reproduce lab export check bench lock clean help

help:
	@echo "make demo       the whole method on a laptop: install, run, report (about ten minutes of computing)"
	@echo "make test       all tests; 'make test-fast' leaves out those marked slow"
	@echo "make lab        JupyterLab in nbs/"
	@echo "make reproduce PROFILE=tiny|demo|lab|paper   all experiments, the ablations too"
	@echo "make export     notebooks -> rlhi/, then clean them;  'make check' fails on any difference"
	@echo "make bench      the benchmarks of tests/benchmarks, as tables"

$(INSTALLED): $(LOCK) $(SMALL) settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rlhi needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --requirement $(SMALL)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/rlhi reproduce demo --only 20_pipeline 21_training 30_user_eval 90_report
	@$(BIN)/rlhi show demo

reproduce: $(INSTALLED)
	@$(BIN)/rlhi reproduce $(or $(PROFILE),demo)

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

test-fast: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m "not slow"

bench: $(INSTALLED)
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lab: $(INSTALLED)
	$(BIN)/jupyter lab nbs

export: $(INSTALLED)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

check: $(INSTALLED)
	@$(BIN)/python -m pytest tests/test_notebooks.py -m "not slow"

lock: $(INSTALLED)
	$(BIN)/python requirements/lock.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
