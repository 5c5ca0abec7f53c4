# Two commands are enough: `make demo` shows the whole trip, `make test` runs every test.
# Both set up what they need (virtual environment, build, Debian packages, guest kernel and disk) the first time.

PYTHON ?= python3
VENV := .venv

.PHONY: demo test setup check bench clean

demo: setup
	@$(VENV)/bin/python scripts/demo.py

test: setup
	@scripts/test

setup:
	@PYTHON="$(PYTHON)" scripts/setup

check: setup
	@scripts/check

bench: setup
	@$(VENV)/bin/python -m bench

clean:
	rm -rf $(VENV) target
