# make run    train cross entropy and LACE on scikit-learn's digits, three seeds each, and print the comparison
# make test   run the tests; K=expression runs those whose names fit it, as pytest's -k
# make quick  run a part of them in less than a minute
# Both install what they need into .venv first. PYTHON=python3.12 chooses another Python, at least 3.11.

PYTHON ?= python3
EXTRAS := dev
BIN := .venv/bin

run: .venv/installed
	$(BIN)/python -m lace_loss.train --loss both --seeds 0-2

K :=
test: .venv/installed
	$(BIN)/python -m pytest -q $(if $(K),-k "$(K)")

# The definition, the kernel, every option, edges and pages.
quick: .venv/installed
	$(BIN)/python -m pytest -q tests/test_edges.py tests/test_options.py tests/test_pages.py README.md */README.md -k "not cuda"
	@echo "Left out: accuracy, errors, torch's cases, GPU kernels, machines, fuzzing, training, files, checker: make test"

# The GPU kernels as compiled, in the emulator of tests/machines/ptx.py.
test-gpu: .venv/installed
	$(BIN)/python -m pytest -q tests/test_ptx.py tests/test_gpu.py
	$(BIN)/python -m pytest -q -k cuda tests/test_torch.py tests/test_edges.py tests/test_torch_cases.py tests/test_dispatch.py tests/test_errors.py

# Every float32 x, not every 64th: rows (0, x), (0, x, x), by the kernel and by lace_row.c. 6 minutes of CPU time.
exhaustive: .venv/installed
	EXHAUSTIVE_STEP=1 $(BIN)/python -m pytest -q -s tests/test_fuzz.py -k every_float

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy ref ext train

# A strict editable install links the folders, so that edits are live and type checkers find the modules; new files and the
# C kernel need this rule again, which the folders' own dates trigger.
.venv/installed: pyproject.toml setup.py ref ext ext/torch train $(wildcard ext/*.pyx ext/*.c ext/*.h ext/builds/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]' --config-settings editable_mode=strict
	touch $@

.PHONY: run test quick test-gpu exhaustive lint
