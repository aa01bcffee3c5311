# Everyday commands; `just` lists them. Each is one line that works without just, too.

default:
    @just --list

# once after cloning: the git filter and hook that keep index addresses out of uv.lock, and git status clean
setup:
    git config filter.uvlock.clean "python3 tools/reduce_lock.py"
    git config core.hooksPath tools/git-hooks
    uv lock --quiet
    git add uv.lock

test *arguments:
    uv run pytest {{arguments}}

# builds wheels and installs them into clean environments: minutes, needs a package index
packaging:
    uv run pytest -m packaging

# trains every variant for a while: minutes
slow:
    uv run pytest -m slow

# interrupts and overtakes the long operations at every line: many minutes, not part of .ci/run
exhaustive:
    uv run pytest -m exhaustive

# the tests as on other processors: in all ways, those that some processor has failed; --all is the whole suite
processors *arguments:
    uv run python tools/processors.py {{arguments}}

# the PEFT bridge with TRL, under the first and the last PEFT of its range; needs a package index
peft:
    tools/versions peft

# the Trainer's integration with TRL, under the first and the last transformers of its range; needs a package index
trainer:
    tools/versions transformers

# exports and adapter files served by vLLM in an environment of its own: minutes, needs a package index
serving:
    uv run pytest -n0 -m serving

# the scripts of docs/recipes.md, each in an environment of its own; `just recipes timm` runs one; needs a package index
recipes *words:
    tools/recipes {{words}}

# quantised bases on this machine, on CUDA where there is one
bnb-smoke:
    uv run pytest tests/test_quantised.py tests/test_twins.py tests/test_packing.py tests/test_four_bit.py

# a few training steps, save and reload on Qwen3: a name on the hub, a folder, or (without) a tiny one made on the spot
qwen-probe *arguments:
    uv run python examples/qwen_probe.py {{arguments}}

lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run pyright

# the kit on every installed variant: half a minute a core
smoke:
    uv run pytest tests/test_kit.py -m "slow or not slow" -k keep_every_promise

# build every package, and look at its metadata as an index would
dist:
    rm -rf dist
    uv build --all-packages --out-dir dist
    uvx twine check --strict dist/*

# before every commit: lint, tests, smoke of all variants, packages and their metadata
check: lint test smoke dist

# resolve all versions anew and reduce the lock to pins
lock:
    rm -f uv.lock
    uv lock
    python3 tools/reduce_lock.py < uv.lock > uv.lock.reduced
    mv uv.lock.reduced uv.lock

# the pages of docs/ that are made from the code, then the site in docs/_build; needs no network
docs:
    uv run python tools/make_docs.py
    uv run sphinx-build -W -n -q -b html docs docs/_build
