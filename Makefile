# Everything goes through a .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint format clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,onnx,serve,dev]'
	touch $@

demo: setup
	$(BIN)/qf demo

test: setup
	$(BIN)/python -m pytest -n auto

# mypy wants the package under its own name: build/types/qf is this folder
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types && ln -sfn ../.. build/types/qf
	MYPYPATH=build/types $(BIN)/mypy -m qf.cli -p qf.pipeline -p qf.trainer -p qf.retrieval -p qf.data

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
