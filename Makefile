# What one does here. Every target works alone on a fresh clone with nothing but Python 3.11 or newer and make;
# the environment is made on first use and kept.

VENV := .venv
# Which interpreter the environment is made with; empty takes the first that is new enough.
PYTHON ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help picture test browser lint fix

help:
	@echo 'Darkroom'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 chooses the interpreter that $(VENV) is made with.'

picture: ## PROMPT="a red apple" draws it; more flags in ARGS="--seed 3 --denoising-steps 30"
	$(if $(strip $(value PROMPT)),,$(error PROMPT is missing; say for example: make picture PROMPT="a red apple"))
	@$(READY) run -r requirements.txt
	@$(VENV)/bin/python demo/demo_txt2img.py $(value ARGS) -- "$$PROMPT"

test: ## runs the tests; more flags for pytest in ARGS="-m slow"
	@$(READY) all -r requirements.txt -e '.[test,lint]'
	@$(VENV)/bin/python -m pytest $(value ARGS)

browser: ## installs Chromium, without which the tests of the page are skipped (Debian and its kin, as root)
	apt-get install -y chromium chromium-driver

lint: ## checks the code's style and the order of its imports
	@$(READY) all -r requirements.txt -e '.[test,lint]'
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/lint-imports setup.cfg --no-cache

fix: ## repairs what the style check can repair
	@$(READY) all -r requirements.txt -e '.[test,lint]'
	@$(VENV)/bin/python -m ruff check --fix .

# The prompt goes to the script through the environment, and as it was typed: neither make nor the shell may read
# its quotes, dollars or semicolons. `value` keeps make from expanding it.
ifdef PROMPT
override PROMPT := $(value PROMPT)
export PROMPT
endif

# READY NAME PIP-ARGUMENTS...: the environment exists and holds what pip was asked for.
#
# A finished install leaves .installed-NAME-CHECKSUM, so repeating it costs one start of the interpreter, and a
# changed requirement is noticed. While the environment is being changed, .unfinished holds the process id; one
# that is found without its process was interrupted or failed, and nothing of that environment is trusted.
READY = sh -euc "$$READY_SCRIPT" make
export VENV PYTHON
define READY_SCRIPT
name=$$1; shift
checksum=$$(cat requirements.txt setup.cfg pyproject.toml | cksum | cut -d ' ' -f 1)

new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
identity() { "$$1" -c 'import sys; print(sys.base_prefix, sys.version)'; }
say() { printf '%s\n' "$$*" >&2; }

if [ -e "$$VENV/.unfinished" ] && kill -0 "$$(cat "$$VENV/.unfinished")" 2>/dev/null; then
    say "Process $$(cat "$$VENV/.unfinished") is installing into $$VENV: wait for it, or end it."
    exit 1
fi
if [ -n "$$PYTHON" ] && ! new_enough "$$PYTHON"; then
    say "PYTHON=$$PYTHON is not Python 3.11 or newer."
    exit 2
fi
if [ -e "$$VENV/.unfinished" ] || ! new_enough "$$VENV/bin/python" ||
    { [ -n "$$PYTHON" ] && [ "$$(identity "$$PYTHON")" != "$$(identity "$$VENV/bin/python")" ]; }; then
    for python in "$$PYTHON" python3 python3.13 python3.12 python3.11 python; do
        new_enough "$$python" && break
        python=
    done
    if [ -z "$$python" ]; then
        say "No Python 3.11 or newer is on the PATH; name one with PYTHON=/path/to/python3."
        exit 2
    fi
    rm -rf "$$VENV"
    mkdir -p "$$VENV"
    echo $$$$ > "$$VENV/.unfinished"
    say "$$python -m venv $$VENV"
    "$$python" -m venv "$$VENV"
elif [ -e "$$VENV/.installed-$$name-$$checksum" ] || [ -e "$$VENV/.installed-all-$$checksum" ]; then
    exit 0
fi
echo $$$$ > "$$VENV/.unfinished"
rm -f "$$VENV"/.installed-*
say "$$VENV/bin/python -m pip install $$*    (once: some minutes and 2 GB, more where PyTorch comes with CUDA)"
"$$VENV/bin/python" -m pip install --disable-pip-version-check --no-input "$$@" >&2
: > "$$VENV/.installed-$$name-$$checksum"
rm "$$VENV/.unfinished"
endef
export READY_SCRIPT
