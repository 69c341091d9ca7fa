# Every target does the set-up it needs; twice is harmless. The environment is .venv.
#   make setup PYTHON=python3.12     with another Python (3.11 or newer)
#   make test PYTEST_ARGS="-k name"  only some tests

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-all lint

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "varkit needs Python 3.11 or newer, but $(PYTHON) is" \
			"$$($(PYTHON) --version 2> /dev/null || echo not installed);" \
			"try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch by itself and pinned: left to the resolver, a newer build of several gigabytes may come instead
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[data,plots,text,studio,serve,ray,dev]' -c constraints.txt
	touch $@

demo: $(STAMP)
	mkdir -p demo
	printf '%s\n' \
		'a red circle' \
		'three blue stars on a beige background' \
		'a green ring left of an orange heart' \
		'a small white cross above a large purple square on a navy background' > demo/prompts.txt
	$(BIN)/varkit generate --prompts demo/prompts.txt --seed 0 --previews --out demo/

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m '' $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy varkit
