# Any target can be the first command on a fresh machine: .venv is made when it is missing or out of date.
PYTHON ?= python3
JOBS ?= 2
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help figures test notebooks refresh lab badges docs links clean

help:  ## show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

figures: .venv/.ready  ## run the changed notebooks and redraw every figure
	$(RUN) -m erasekit notebooks run --jobs $(JOBS)

test: .venv/.ready  ## run the tests, then every notebook against its committed outputs
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n $(JOBS)
	$(MAKE) notebooks

notebooks: .venv/.ready  ## only every notebook against its committed outputs; those that make figures has run are not run again
	OMP_NUM_THREADS=1 $(RUN) -m erasekit notebooks verify --jobs $(JOBS)

refresh: .venv/.ready  ## re-execute the notebooks in place, ready to commit
	$(RUN) -m erasekit notebooks refresh --jobs $(JOBS)
	$(RUN) -m erasekit notebooks check

lab: .venv/.ready  ## open 00_start_here in JupyterLab, with its panels live
	$(RUN) -m jupyterlab notebooks/00_start_here.ipynb

badges: .venv/.ready  ## write badges for Binder and Colab into the README: make badges REPOSITORY=owner/name
	$(RUN) -m erasekit notebooks badges $(REPOSITORY)

docs: .venv/.docs  ## build the site from README, notebooks and docstrings in build/docs
	rm -rf build/docs
	TRANSFORMERS_VERBOSITY=error $(RUN) -m sphinx -E -W --keep-going -q -c docs -d build/doctrees . build/docs
	@echo "open build/docs/index.html"

links: .venv/.docs  ## check the external links of the site (needs a network)
	TRANSFORMERS_VERBOSITY=error $(RUN) -m sphinx -E -q -b linkcheck -c docs -d build/doctrees . build/links

clean:  ## remove executed copies, the site and caches (trained checkpoints in build/ and .venv stay)
	rm -rf build/notebooks build/docs build/doctrees build/links .pytest_cache .ruff_cache *.egg-info
	find erasekit tests notebooks -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "erasekit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.lock
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

.venv/.docs: .venv/.ready requirements-docs.lock
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-docs.lock -c requirements.lock
	touch $@
