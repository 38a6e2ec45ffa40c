# `make serve` and `make test` do all set-up. `make check` is what CI runs beside the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Of `make load`: what is asked, by how many users, and for how long; and Locust's or our own further options.
URL ?= http://127.0.0.1:8000
USERS ?= 20
SHAPE ?= steps
DURATION ?= 60
OPTIONS ?=

.PHONY: serve test load cluster bench chaos check format clean

serve: $(VENV)/.serve
	@exec $(BIN)/python -m serve_app serve_config.yaml

# First what can share the machine, two files at a time; then what starts the service, and needs it for itself.
test: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m 'not service' --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests -m service --durations 10

load: $(VENV)/.load
	$(BIN)/locust -f loadtest/traffic/locustfile.py --headless --loglevel WARNING \
		--host $(URL) --users $(USERS) --shape $(SHAPE) --run-time $(DURATION) $(OPTIONS)

cluster: $(VENV)/.serve
	@exec $(BIN)/python -m cluster.local

bench: $(VENV)/.bench
	$(BIN)/python -m loadtest.bench $(OPTIONS)

# Everything that can be killed, under load; about eight minutes. `OPTIONS=--short` takes two.
chaos: $(VENV)/.load
	$(BIN)/python -m loadtest.chaos --output docs/faults.md $(OPTIONS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# A file in the virtual environment marks each set as installed; it is newer than what names the set.
$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.serve

$(VENV)/.load: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[load]'
	touch $@ $(VENV)/.serve

$(VENV)/.bench: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@ $(VENV)/.serve
