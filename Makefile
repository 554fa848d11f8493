# Everything runs in .venv, which the first target that needs it makes.
SHELL := /bin/bash
PYTHON ?= python3
MODELS ?= full
BUNDLE ?= $(if $(wildcard engines/$(MODELS)),engines/$(MODELS),engines/mini)
BIN := .venv/bin
EVENTS ?= 100000
MINUTES ?= 60
STORE := out/results.db
ADDRESS := tcp://127.0.0.1:5577

# On a Jetson TensorRT comes with the system; elsewhere nothing of the system's Python is needed.
SEEN = $(shell $(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" if u.find_spec("tensorrt") else "")')

.PHONY: setup run test check lint export image flash collect test-gpu bench bench-gpu chaos soak clean
.DEFAULT_GOAL := run

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Lookout needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(SEEN) .venv || { echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[export,nats,dev]'
	@touch $@

# The main job on the sample video: export, watch, describe, publish, collect. VIDEO=path names a copy of vtest.avi.
run: setup
	@mkdir -p out && rm -f $(STORE)* out/spool.db*
	@$(BIN)/python -m export build configs/models-mini.toml
	@video=$$($(BIN)/python -m export sample $(if $(VIDEO),--video '$(VIDEO)')) && ln -sf "$$(realpath "$$video")" out/vtest.avi
	@trap 'kill -TERM $$collector $$edge 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	  $(BIN)/collector run --bind $(ADDRESS) --store $(STORE) & collector=$$!; \
	  $(BIN)/edge run --config configs/demo.toml --draw out/demo.png >out/edge.txt 2>out/edge.log & edge=$$!; \
	  wait -n; kill -TERM $$collector $$edge 2>/dev/null; wait $$collector; code=$$?; wait $$edge || code=$$?; \
	  if [ $$code = 0 ]; then cat out/edge.txt; else cat out/edge.log; fi; exit $$code

# A soak of ten minutes goes on beside the others; it always does the same.
test: check .venv/compilers .venv/system
	@mkdir -p out; nice $(BIN)/python -m tests.soak --minutes 10 --seed 1 >out/soak.txt 2>&1 & soak=$$!; \
	  trap 'kill -TERM $$soak 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	  $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile; code=$$?; \
	  wait $$soak || code=1; cat out/soak.txt; exit $$code

# What compiles engines and kernels without a GPU: the tests' alone, and 300 MB.
.venv/compilers: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[compilers]'
	@touch $@

# A Debian of its own, ssh, and an RTSP server with what it encodes by: some tests' alone, which are skipped without.
# The system's gi is for the system's Python, but works in any of the same 3.x.
SYSTEM := debootstrap iproute2 openssh-client systemd-container python3-gi gir1.2-gst-rtsp-server-1.0 \
  gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav

.venv/system: .venv/ready
	@missing=; for one in $(SYSTEM); do \
	  dpkg-query --show --showformat '$${db:Status-Status}' $$one 2>/dev/null | grep -qx installed || missing="$$missing $$one"; \
	done; \
	if [ "$$(id -u)" = 0 ] && [ -n "$$missing" ] && command -v apt-get >/dev/null; then \
	  apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends $$missing && missing=; fi; \
	version='import sys; print(sys.version_info[:2])'; gi=/usr/lib/python3/dist-packages/gi; \
	if [ -d $$gi ] && [ "$$(/usr/bin/python3 -c "$$version")" = "$$($(BIN)/python -c "$$version")" ]; then \
	  ln -sfn $$gi "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gi"; fi; \
	if [ -z "$$missing" ]; then touch $@; \
	else echo "tests are skipped that need root and these of Debian's packages:$$missing" >&2; fi

# On a machine with an NVIDIA GPU, TensorRT and a CUDA binding; what is missing is said.
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu -v

bench-gpu: setup
	$(BIN)/python -m tests.bench.gpu

check: lint
	$(BIN)/mypy

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

export: setup
	$(BIN)/python -m export build configs/models-$(MODELS).toml

# lookout_VERSION_ARCH.deb in out/, for ARCH=arm64 or amd64, else both: make image BUNDLE=engines/full
image: setup
	@[ '$(BUNDLE)' != engines/mini ] || $(BIN)/python -m export build configs/models-mini.toml
	@$(BIN)/python -m appliance image --bundle '$(BUNDLE)' $(if $(ARCH),--arch '$(ARCH)')

# One box, or several, four at a time: make flash BOX=user@host BUNDLE=engines/full, or BOXES=file with one a line.
flash: setup
	@[ '$(BUNDLE)' != engines/mini ] || $(BIN)/python -m export build configs/models-mini.toml
	@$(BIN)/python -m appliance flash --bundle '$(BUNDLE)' $(if $(BOX),--box '$(BOX)') $(if $(BOXES),--boxes '$(BOXES)')

collect: setup
	$(BIN)/collector run --bind $(ADDRESS) --store lookout.db --health 127.0.0.1:9478

# Longer than the one in the tests: make chaos EVENTS=1000000 SEED=7
chaos: setup
	$(BIN)/python -m tests.chaos --events $(EVENTS) $(if $(SEED),--seed $(SEED))

# A box before four cameras, with faults: make soak MINUTES=10 SEED=7
soak: setup
	@$(BIN)/python -m export build configs/models-mini.toml
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: setup
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.start
	$(BIN)/python -m tests.bench.tracking
	$(BIN)/python -m tests.bench.looks
	$(BIN)/python -m tests.bench.motion
	$(BIN)/python -m tests.bench.delivery
	$(BIN)/python -m tests.bench.nats

clean:
	rm -rf .venv out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
