# Each target is the only command a fresh machine needs: it makes its own .venv and installs into it.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python

# TORCH=cpu: PyTorch without its CUDA libraries, torch and torchvision of one index
TORCH_CPU := --index-url https://download.pytorch.org/whl/cpu

.PHONY: demo test lint docs help

help:
	@echo "make demo   the whole chain on the embedded miniature world, into demo_output/"
	@echo "make test   the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documents as a site, into site/"
	@echo "TORCH=cpu   with the first of them: PyTorch without CUDA"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(if $(filter cpu,$(TORCH)),$(PY) -m pip install --quiet torch torchvision $(TORCH_CPU))
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

# The report is tested in a real browser where there is one or one can be installed; else those
# tests are skipped and say so.
$(VENV)/browser: $(VENV)/installed
	-@tests/install_browser.sh $(PY)
	touch $@

demo: $(VENV)/installed
	$(PY) demo.py

# A process per core, up to four, each with one thread; a file's tests share one process.
test: $(VENV)/installed $(VENV)/browser
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m mypy
