# Two commands matter: `make up` starts the mesh, `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')

.DEFAULT_GOAL := help
.PHONY: help install up test check format lock audit clean

help: ## what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

.venv/.packages: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Duohuo needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	touch $@

.venv/.stubs: $(PROTOS) protos/generate.py .venv/.packages
	$(BIN)/python protos/generate.py
	touch $@

.venv/.installed: pyproject.toml .venv/.stubs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

install: .venv/.installed ## set up .venv with the `duohuo` command in it

up: install ## start the mesh on this machine (ARGS="--centers a,b,c" for more)
	@exec $(BIN)/duohuo up $(ARGS)

check: install ## format, lint, types, import layers and protos, without the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos/image.binpb --config protos/buf.yaml

test: check ## everything that must be true, from lint to killed centers
	$(BIN)/python -m pytest -n auto tests/unit tests/contract tests/simulation
	$(BIN)/python -m pytest tests/integration

format: install ## rewrite the code the way the checks want it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## write requirements.txt anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --generate-hashes --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements.txt

audit: ## look for known holes in what requirements.txt names (asks pypi.org)
	python3 -m venv .audit
	.audit/bin/pip install -q pip-audit
	.audit/bin/pip-audit -r requirements.txt --require-hashes --disable-pip --strict

clean: ## forget the set-up and the generated stubs, but keep the mesh's data
	rm -rf .venv .audit build dist
	find duohuo buf -name '*_pb2*' -delete
	rm -f protos/image.binpb
