# `make demo`: stand-in data, MG-MRA trained and evaluated on it, results in runs/demo/.
# `make test`: the tests. Both make .venv and install requirements.txt first, once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.requirements-installed
DEMO := runs/demo

.PHONY: demo test lint

demo: $(READY)
	test -e $(DEMO)/data/stand_in.json || $(BIN)/python stand_in.py --layout regdb \
		--out $(DEMO)/data --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0
	$(BIN)/python train_MGMRA.py --dataset regdb --data-path $(DEMO)/data --preset scratch --amp \
		--output-dir $(DEMO) --overwrite
	$(BIN)/python test.py --dataset regdb --data-path $(DEMO)/data --trial 1 \
		--resume $(DEMO)/last.pt --output-dir $(DEMO) --figures

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
