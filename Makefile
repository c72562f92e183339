# Two commands: `make demo` and `make test`. Both set up .venv first; what is done is not done again.

.PHONY: demo docs lint picture test test-slow

demo: .venv/.installed
	@.venv/bin/retemper demo

# docs/configuration.md, from the schema.
docs: .venv/.installed
	@.venv/bin/python -m retemper.pipeline.config.key_docs > docs/configuration.new
	@mv docs/configuration.new docs/configuration.md

# README's picture, from the demo's own output.
picture: demo
	@cp runs/demo/figures/learning_forgetting.png docs/images/demo.png

lint: .venv/.installed
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --no-error-summary

test: lint
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# All slow tests, or with PACKAGE=checkpoint those whose files import from that package.
test-slow: .venv/.installed
	@.venv/bin/python -m pytest -m slow $(if $(PACKAGE),--package=$(PACKAGE))

.venv/.installed: constraints.txt pyproject.toml .ci/setup
	@.ci/setup

# New versions within pyproject.toml's bounds, for every platform. The file names no package index.
.PHONY: constraints
constraints:
	@{ echo "# Compiled from pyproject.toml by \`make constraints\` (needs uv): exact versions of everything in .venv."; \
	  uv pip compile pyproject.toml --extra test --universal --python-version 3.12 --no-header --no-annotate --quiet; } > constraints.new
	@mv constraints.new constraints.txt
