# make demo: the paper's LeNet5 row from nothing, in minutes; SEED=1 takes another seed.
# make test: tests and lint.   make quick: the method's own tests, for whoever changes a step.
# make check-gpu: what to run first on a GPU, by PYTHON as it is: nothing is installed or downloaded.
#   make check-gpu PYTHON=python3 CHECK="--output DIR --parts tests steps"
PYTHON ?= python3
SEED ?= 0
PY := .venv/bin/python

.PHONY: demo test quick check-gpu clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/installed-plot: .venv/installed pyproject.toml
	$(PY) -m pip install -q -e ".[plot]"
	touch $@

.venv/installed-test: .venv/installed pyproject.toml
	$(PY) -m pip install -q -e ".[test]"
	touch $@

# A short schedule to 22.5 KB: docs/schedules.md has its runs.
DEMO := --epoch_pretrain 6 --lr_pretrain 0.05 --milestones_pretrain 3 5 --target_kb 22.5 --pr 0.95 \
	--epoch_basis 1 --epoch_coord 0 --epoch_ste 16 --ld_ste 0.85 --epoch_post_coord 1

demo: .venv/installed-plot
	$(PY) lenet5.py --PRETRAIN --ALQ --POSTTRAIN $(DEMO) --seed $(SEED) \
		--model_ori checkpoints/demo/lenet5_model_ori.pth --model checkpoints/demo/lenet5_model.pth
	$(PY) lenet5.py --EVAL checkpoints/demo/lenet5_model_posttrained.alq
	$(PY) -m alq plot checkpoints/demo/lenet5_model.jsonl

# One process for each core, one thread each. Shuffled: make test PYTEST=--random-order-seed=1
test quick: export OMP_NUM_THREADS ?= 1
RUN_TESTS = $(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder $(PYTEST)
METHOD := $(patsubst %,tests/test_%.py,steps any_model golden compiled quantize ridge precision)

test: .venv/installed-test
	$(RUN_TESTS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

quick: .venv/installed-test
	$(RUN_TESTS) $(METHOD)

check-gpu:
	$(PYTHON) benchmarks/check_gpu.py $(CHECK)

clean:
	rm -rf .venv checkpoints/demo
