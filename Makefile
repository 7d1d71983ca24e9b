# Each target is a command of `python -m helpers`, which also runs where there is no make.
PYTHON ?= python3
MODEL ?= $(or $(COURSE_MODEL),smollm2-135m)
HELPERS = $(PYTHON) -m helpers

.PHONY: run check test nightly durations lab ui bench doctor setup generate clean distclean

run:
	@$(HELPERS) run --model "$(MODEL)"

check:
	@$(HELPERS) check

test:
	@$(HELPERS) test

nightly:
	@$(HELPERS) nightly

durations:
	@$(HELPERS) durations

lab:
	@COURSE_MODEL="$(MODEL)" $(HELPERS) lab

ui:
	@$(HELPERS) ui

bench:
	@$(HELPERS) bench

doctor:
	@$(HELPERS) doctor

setup:
	@$(HELPERS) setup

generate:
	@$(HELPERS) generate

clean:
	@$(HELPERS) clean

distclean:
	@$(HELPERS) distclean
