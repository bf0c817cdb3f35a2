# make demo: the three stages on real MNIST with a short schedule.   make test: tests and lint.
# make quick: the method's own tests, for whoever changes a step.
# make check-gpu: what to run first on a GPU, by PYTHON as it is: nothing is installed or downloaded.
#   make check-gpu PYTHON=python3 CHECK="--output DIR --parts tests steps"
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test quick check-gpu clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed pyproject.toml
	$(PY) -m pip install -q -e ".[test]"
	touch $@

DEMO := --epoch_pretrain 3 --lr_pretrain 0.05 --milestones_pretrain 2 --target_bit 0.9 --pr 1 \
	--epoch_basis 1 --epoch_coord 1 --epoch_ste 3 --epoch_post_coord 1

demo: .venv/installed
	$(PY) lenet5.py --PRETRAIN --ALQ --POSTTRAIN $(DEMO) \
		--model_ori checkpoints/demo/lenet5_model_ori.pth --model checkpoints/demo/lenet5_model.pth

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
