# `make demo`: stand-in data, MG-MRA trained and evaluated on it, results in runs/demo/.
# `make test`: the tests. Each makes .venv and installs what it needs there first, once.

PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.installed
DEV := .venv/.installed-dev
DEMO := runs/demo
# bf16 where the processor computes in it; elsewhere it is emulated, 20 times slower than float32.
AMP := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo --amp)

.PHONY: demo test lint

demo: $(RUN)
	test -e $(DEMO)/data/stand_in.json || $(BIN)/python stand_in.py --layout regdb \
		--out $(DEMO)/data --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0
	$(BIN)/python train_MGMRA.py --dataset regdb --data-path $(DEMO)/data --preset scratch $(AMP) \
		--output-dir $(DEMO) --overwrite
	$(BIN)/python test.py --dataset regdb --data-path $(DEMO)/data --trial 1 \
		--resume $(DEMO)/last.pt --output-dir $(DEMO) --figures

test: $(DEV)
	$(BIN)/python -m pytest

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(RUN): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python %d.%d is too old: \
	make PYTHON=... with 3.10 or newer" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(DEV): $(RUN) requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@
