# Targets run from the repository's root in .venv, which `make setup` makes and renews when requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# A rank for each GPU of this machine; without one, four CPU ranks.
NPROC ?= $(or $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')),4)
FUZZ_SECONDS ?= 60
FUZZ_SEED ?=
ARGS ?=
WORKERS ?= 2
TE_PYTHON ?= python3
GPU_PYTHON ?= python3
MEGATRON ?=
PEERS_PYTHON ?= python3
PEERS_MIRROR ?=

.PHONY: setup train test test-full fuzz test-te-import test-megatron test-migrate test-peers check-comparison test-faults test-reported test-slurm test-netns test-gpu lint bench report clean

setup: $(STAMP)

# torch comes first and alone: as a dependency of another package, pip may pick another build.
# tests/unit/test_*_contract.py check our calls against the Python sources of Transformer Engine and flash-attn (no CUDA, not on the path).
$(STAMP): requirements.txt requirements-gpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	rm -rf .venv/te_sources
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/te_sources "$$(sed -n 's/\[pytorch\]//p' requirements-gpu.txt)"
	rm -rf .venv/flash_attn_sources
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--no-binary flash-attn --dest .venv/flash_attn_sources "$$(sed -n 's/^# optional: //p' requirements-gpu.txt)"
	tar -xzf .venv/flash_attn_sources/*.tar.gz -C .venv/flash_attn_sources --strip-components=2 --wildcards '*/flash_attn/flash_attn_interface.py'
	rm .venv/flash_attn_sources/*.tar.gz
	touch $(STAMP)

train: $(STAMP)
	@echo "$(NPROC) ranks (NPROC=N takes another number)"
	$(BIN)/python -m launch.torchrun --nproc-per-node $(NPROC) train.py --cp-size $(NPROC) $(ARGS)

# WORKERS: processes that run test files side by side. A test starts up to eight ranks of its own, mostly two to four.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# All tests, also those that repeat others on more layouts; about twice as long.
test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not machine and not fuzz" $(ARGS)

# Mutated files for every reader, for about FUZZ_SECONDS in all; make fuzz FUZZ_SECONDS=3600 before a release. FUZZ_SEED: the first of
# consecutive seeds, so that CI's run can be repeated; without it the seeds are random.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -m fuzz --tb=short --show-capture=no tests/fuzz $(ARGS)

# Transformer Engine itself, without a GPU (docs/gpu.md). TE_PYTHON: python of an environment that can import transformer_engine.
test-te-import:
	OMP_NUM_THREADS=1 $(TE_PYTHON) -m pytest -p no:cacheprovider tests/te_import $(ARGS)

# Against megatron-core (CPython 3.11): pip install --no-deps --target DIR megatron-core==0.16.1, then MEGATRON=DIR.
test-megatron: $(STAMP)
	PYTHONPATH=$(MEGATRON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/megatron $(ARGS)

# Converted configurations in Axolotl's and NeMo AutoModel's own validators (docs/migrate.md). PEERS_PYTHON: python that can import both.
# AXOLOTL_EXAMPLES, NEMO_EXAMPLES: folders of their examples.
test-migrate:
	OMP_NUM_THREADS=1 $(PEERS_PYTHON) -m pytest -m machine -rs -p no:cacheprovider tests/peers/test_migrate.py $(ARGS)

# The peers' own context parallelism on CPU ranks against float64 (docs/comparison); prints a table and writes JSON. About four minutes.
test-peers:
	PEERS_JSON=benchmarks/results/peers_cpu.json OMP_NUM_THREADS=1 $(PEERS_PYTHON) -m pytest -m machine -rs -p no:cacheprovider \
		tests/peers/test_cp.py $(ARGS)

# Source references of docs/comparison and docs/best_practices.md against the peers' commits. PEERS_MIRROR: folder of clones, as NAME or as
# OWNER+NAME/repo; what is not there is skipped with a message.
check-comparison: $(STAMP)
	$(BIN)/python tests/references.py $(if $(PEERS_MIRROR),--mirror $(PEERS_MIRROR)) $(ARGS)

# Kill, hang and corrupt runs (docs/operate.md); prints a table and writes JSON. Cases of full disks mount one, as root.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --json benchmarks/results/faults_cpu.json $(ARGS)

# Faults that were reported from outside, as commands; prints a table. About four minutes.
test-reported: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.reported $(ARGS)

# launch/slurm.sbatch under a SLURM that the tests start and end; Debian: apt-get install slurm-wlm munge. About ten minutes.
test-slurm: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m machine -rs tests/slurm $(ARGS)

# launch/multi_node.sh in two network namespaces whose cable is cut. Needs root and ip (Debian: iproute2).
test-netns: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m machine -rs tests/netns $(ARGS)

# On a machine with one GPU. GPU_PYTHON: python with the packages of docs/gpu.md. Figures go to $OUT, or to benchmarks/results. Both parts run,
# also if the first fails. NVTE_TORCH_COMPILE=0: compiling Transformer Engine's small functions takes each rank a minute.
test-gpu: export NVTE_TORCH_COMPILE = 0
test-gpu: export NVTE_UNFUSED_ATTN = 0
test-gpu: export GPU_TEST_SECONDS ?= 240
test-gpu:
	$(GPU_PYTHON) -m pytest -p no:cacheprovider -rs tests/gpu $(ARGS); tests=$$?; \
	$(GPU_PYTHON) tools/verify.py --all --device cuda --json $(or $(OUT),benchmarks/results)/verify_all_gpu.json && exit $$tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py

# Curves of runs in one HTML file: make report RUN=runs/a, or RUN="runs/a runs/b".
report: $(STAMP)
	$(BIN)/python tools/report.py $(RUN) $(ARGS)

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache
