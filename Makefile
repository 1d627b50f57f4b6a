PYTHON ?= python3
export ENGINE BACKEND TARGET MODEL BUILD_ARGS
RECIPE ?= recipes/shelter/recipe.toml
BIN := .venv/bin

.PHONY: help setup demo train serve chat test full check lint type onnx-env bench-peers bench-serve bench-train bench-training bench-card \
	image-cpu image-cuda image-rocm image-test image-test-arm64 clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /  \1\t/' | expand -t 20

setup: ## .venv, pinned packages and llama.cpp for this CPU (BACKEND=cpu|cuda|rocm, TORCH_INDEX=, CMAKE_ARGS=)
	@$(PYTHON) -m appliance.setup

demo: setup ## train, convert, verify and serve the sample assistant, and ask it one question in each language
	$(BIN)/appliance run recipes/shelter/recipe.toml --ask 1

train: ## train, convert, verify and promote RECIPE: in a container if there is one, else in .venv (ENGINE=, BACKEND=, ARGS=)
	@$(PYTHON) -m appliance.containers train "$(RECIPE)" $(ARGS)

serve: ## serve the promoted model on port 8080, likewise
	@$(PYTHON) -m appliance.containers serve $(ARGS)

chat: setup ## talk to a running server
	$(BIN)/appliance chat $(ARGS)

test: setup ## the tests that CI runs
	$(BIN)/pytest $(ARGS)

full: setup ## all tests, also the slow ones and those for an accelerator; but for `make image-test*`
	$(BIN)/pytest -m "not image and not image_arm64" $(ARGS)

check: lint type ## lint, types, import contracts, Dockerfiles
	$(BIN)/lint-imports
	$(BIN)/hadolint --ignore DL3008 Dockerfile.cpu Dockerfile.cuda Dockerfile.rocm Dockerfile.model

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup ## mypy
	$(BIN)/mypy

onnx-env: setup ## the environment that exports encoders to ONNX, in the cache (1.3 GB, once)
	$(BIN)/python -m appliance.onnx_setup

bench-peers: setup ## build llama-server and llama-bench, from the same source as the engine, to be measured beside
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-serve: setup ## this server beside llama-server and others on this machine, 20 minutes (ARGS="--quick")
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-train: setup ## what a 4B model's way to Q4_K_M costs here, beside the plain upstream chain (ARGS=4B)
	$(BIN)/python -m benchmarks.conversion $(or $(ARGS),4B)

bench-training: setup ## memory of training beside its plan, and its speed beside a plain TRL script, here, 40 minutes
	$(BIN)/python -m benchmarks.training_memory $(or $(FOLDER),build/training)
	$(BIN)/python -m benchmarks.training_speed $(or $(FOLDER),build/training)

bench-card: setup ## training on a capped NVIDIA card, streamed and as plain QLoRA (ARGS="--rounds 3")
	$(BIN)/python -m benchmarks.training_card $(or $(FOLDER),build/training) $(ARGS)

image-cpu: ## container image for any x86-64 or ARM CPU (ENGINE=docker|podman, TARGET=serve|train, MODEL=FILE.appliance)
	@$(PYTHON) -m appliance.images cpu

image-cuda: ## container image for NVIDIA cards
	@$(PYTHON) -m appliance.images cuda

image-rocm: ## container image for AMD cards
	@$(PYTHON) -m appliance.images rocm

image-test: setup ## build the images on a minimal Debian and probe them (needs root, buildah, podman, mmdebstrap)
	$(BIN)/pytest -m image -s -rs tests/images $(ARGS)

image-test-arm64: setup ## the CPU image for ARM, built and probed under emulation (also needs g++-aarch64-linux-gnu, qemu-user-static)
	$(BIN)/pytest -m image_arm64 -s -rs tests/images $(ARGS)

clean: ## remove the caches of tools and interrupted steps (which then start over); trained models stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -rf "$${APPLIANCE_ARTIFACTS:-artifacts}"/*/*.partial
	find appliance benchmarks convert tests -name __pycache__ -type d -prune -exec rm -rf {} +
