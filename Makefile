# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test programs notebooks corpus clean

demo: .venv/.demo
	$(BIN)/armo train experiment=demo
	$(BIN)/armo score model=checkpoints/demo/model input=notebooks/conversations.jsonl

test: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto --dist worksteal

# Run armo beside other programs, each in an environment of its own: all, or PROGRAMS="verl openrlhf".
programs: .venv/.test
	.ci/programs $(PROGRAMS)

# Execute the notebooks again and save their outputs.
notebooks: .venv/.test
	$(BIN)/armo train experiment=demo
	$(BIN)/python notebooks/execute.py

# Write the built-in corpus again after a change of its pieces or of the program.
corpus: .venv/.demo
	$(BIN)/python -m armo.data.builtin.compose

clean:
	rm -rf .venv .venv-* build dist *.egg-info checkpoints/demo

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[embedded]'
	touch $@

.venv/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[dev]'
	touch $@
