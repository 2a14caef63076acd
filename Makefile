# make quickstart   the gain on the embedded digits: train, train with PSG for 2 bits, evaluate, draw
# make test         the tests
# make portable     the tests with 1, 2 and 4 threads, then as on older processors; stops at the first failure
# make reproduce    CIFAR-100 from nothing to table and figures: vanilla, PSGD for each bit-width, Adam, evaluation,
#                   figures. 898 epochs of 75 to 104 seconds on 2 cores, or a few on a GPU (docs/performance.md).
#                   Resumes where it was interrupted; make -j4 runs four at a time.
#                   SEEDS="1 2 3" and TARGETS="4bits 3bits" choose the runs.
# make check        lint, types and the unit tests of quant/, in a minute: for quick checks while you write
# make lint         ruff and mypy
# make oldest       the tests with the oldest versions that requirements.txt allows, in .venv-oldest
# Each sets up its virtual environment by itself, from requirements-dev.txt.

# pip compiles no bytecode (all of it takes a minute), so Python must be free to write it for what it imports.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
RUN := runs/quickstart
DIGITS := --dataset digits --batch_size 16 --epoch 20 --decay_epoch 17 --w_bit 2 --granularity channel

.PHONY: quickstart test check portable lint oldest reproduce
.DEFAULT_GOAL := quickstart

$(READY): requirements.txt requirements-export.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -r requirements-dev.txt
	@touch $@

quickstart: $(READY)
	rm -rf $(RUN)
	$(BIN)/python train.py $(DIGITS) --psg 0 --lr 0.1 --save_epochs 5 --exp_name quickstart/sgd
	$(BIN)/python train.py $(DIGITS) --load_pretrained $(RUN)/sgd/epoch_5.pth --lr 0.01 --lambda_s auto \
		--exp_name quickstart/psgd
	$(BIN)/python eval.py --model_path $(RUN)/sgd/last.pth $(RUN)/psgd/last.pth --w_bit 2 --out $(RUN)/sweep
	$(BIN)/python visualize.py --model_path $(RUN)/sgd/last.pth $(RUN)/psgd/last.pth --labels SGD PSGD --w_bit 2 \
		--layers layer2.0.conv2.weight --out $(RUN)
	$(BIN)/python visualize.py --figure curves --runs $(RUN)/sgd $(RUN)/psgd --labels SGD PSGD --out $(RUN)
	@echo
	@echo "Top-1 on the 360 test digits in percent, of the float weights (FP) and of the same weights cut to 2 bits (W2):"
	@echo
	@$(BIN)/python -m tools.table $(RUN)/sweep/results.csv
	@echo
	@echo "$(RUN)/layer2.0.conv2.weight.png: the weights of a layer; $(RUN)/curves.png: accuracy over the epochs"

# --- make reproduce

SEEDS ?= 1
TARGETS ?= 4bits 4bits_channel 3bits 3bits_channel 2bits 2bits_channel 5bits 6bits 8bits
VANILLA := runs/vanilla/epoch_82.pth
STAGE := --load_pretrained $(VANILLA) --decay_epoch 123 --save_epochs 150
PSGD_RUNS := $(foreach seed,$(SEEDS),$(foreach target,$(TARGETS),runs/cifar100/$(target)_seed$(seed)))
ADAM_RUNS := runs/cifar100/adam_seed1 runs/cifar100/adam_4bits_seed1
RUNS := runs/vanilla $(PSGD_RUNS) $(ADAM_RUNS)

# $(call train,run folder,last epoch,flags): resume the run if it has a checkpoint, else start it
train = if [ -f $(1)/last.pth ]; then $(BIN)/python train.py --exp_name $(1:runs/%=%) --resume --epoch $(2); \
	else rm -rf $(1) && $(BIN)/python train.py $(3) --epoch $(2) --exp_name $(1:runs/%=%); fi

$(VANILLA): | $(READY)
	$(call train,$(@D),82,--psg 0 --lr 0.1 --decay_epoch 82 123 --save_epochs 82 150)

runs/vanilla/epoch_150.pth: $(VANILLA)
	$(BIN)/python train.py --exp_name vanilla --resume --epoch 150

runs/cifar100/adam_seed1/epoch_150.pth: | $(VANILLA)
	$(call train,$(@D),150,$(STAGE) --adam 1 --lr 1e-4 --psg 0)

runs/cifar100/adam_4bits_seed1/epoch_150.pth: | $(VANILLA)
	$(call train,$(@D),150,$(STAGE) --adam 1 --lr 1e-4 --w_bit 4)

bits = $(firstword $(subst bits, ,$(1)))
# lambda_s: 150 at 4 bits, as published, at 5 and 6 bits, and at 3 bits with a grid for each channel; else 600
# (docs/experiments.md, lambda_s as a number)
lambda_s = $(if $(filter 4bits% 5bits% 6bits% 3bits_channel,$(1)),150,600)
granularity = $(if $(filter %_channel,$(1)),channel,tensor)

# $(call psgd_run,target,seed)
define psgd_run
runs/cifar100/$(1)_seed$(2)/epoch_150.pth: | $(VANILLA)
	$$(call train,$$(@D),150,$(STAGE) --w_bit $(bits) --lambda_s $(lambda_s) --granularity $(granularity) --seed $(2))

runs/cifar100/$(1)_seed$(2)/bn.pth: runs/cifar100/$(1)_seed$(2)/epoch_150.pth
	$(BIN)/python -m tools.average $$(@D) --epochs 150 --w_bit $(bits) --out $$@
endef
$(foreach seed,$(SEEDS),$(foreach target,$(TARGETS),$(eval $(call psgd_run,$(target),$(seed)))))

reproduce: $(PSGD_RUNS:%=%/bn.pth) $(RUNS:%=%/epoch_150.pth)
	$(BIN)/python eval.py --model_path $(VANILLA) $(RUNS:%=%/epoch_150.pth) $(PSGD_RUNS:%=%/bn.pth) \
		--w_bit 8 6 5 4 3 2 --post none bn_reestimate --calib_images 4096 --out results/reproduce
	$(BIN)/python -m tools.table results/reproduce/results.csv
	$(BIN)/python visualize.py --figure 1a --results results/reproduce/results.csv --out results/reproduce
	$(BIN)/python visualize.py --figure curves --runs runs/vanilla $(PSGD_RUNS) \
		--labels SGD $(PSGD_RUNS:runs/cifar100/%=%) --out results/reproduce

# one process per core, each with one thread, is faster than one process with all threads
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests

# The instruction sets are torch's own (ATEN) and oneDNN's; onnxruntime's cannot be chosen.
portable: $(READY)
	@for setting in OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 OMP_NUM_THREADS=4 \
		"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" \
		"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41" \
		"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2" \
		"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"; do \
		echo "The tests with $$setting:"; \
		env $$setting $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests || \
			{ echo "The tests fail with $$setting" >&2; exit 1; }; \
	done

UNIT := $(addprefix tests/test_,activations.py fuzz.py grid.py lambda_s.py packed_file.py post_training.py pruning.py \
	psgd.py ranges.py rule.py tracing.py walls.py warped_space.py weights.py)

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal -m "not slow" $(UNIT)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

OLDEST := .venv-oldest

$(OLDEST)/ready: requirements.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -n 's/>=/==/p' requirements.txt requirements-export.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt -r requirements-dev.txt
	@touch $@

oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -q tests
