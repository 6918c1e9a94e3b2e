# `make` lists what there is to do. The first target that needs it installs everything into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits

.DEFAULT_GOAL := help
.PHONY: help install train compare test example docs wheel lint types check format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## install the package and its development tools into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Installing into $(VENV): some minutes, without a word unless something fails"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Installed. For the commands: source $(BIN)/activate"

train: install ## train on handwritten digits, sample, score; an interrupted run is resumed
	$(BIN)/python -m dcdit.train experiment=digits ckpt_path=auto
	$(BIN)/python -m dcdit.sample checkpoint=$(RUN) \
		per_class=24 sampler=heun sampler.steps=15 sampler.clip=true guidance.scale=2
	$(BIN)/python scripts/score_digits.py $(RUN)
	@echo "Pictures: $(RUN)/samples/samples.png and $(RUN)/samples/boundaries.png"

compare: install ## compare DC-DiT with plain DiTs on digits: train 18 small networks, measure, report (three quarters of an hour)
	bash scripts/compare_digits.sh $(BIN)/python

test: install ## run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

example: install ## run examples/own_project with the wheel alone, in a new environment
	bash scripts/own_project.sh $(BIN)/python

docs: install ## build the documentation as a site: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: install ## try the wheel in a new environment with the core dependencies alone
	bash scripts/wheel.sh $(BIN)/python

lint: install ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: install ## check types
	$(BIN)/mypy

check: lint types test ## lint, types and tests: what continuous integration runs

format: install ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what tools cached; data, runs and .venv stay
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
