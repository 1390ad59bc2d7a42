# The compiled kernel: in the checkout, and in wheels for boards. Needs READY and BIN of the Makefile.

.PHONY: kernel wheels
.PHONY: wheel-x86_64 wheel-aarch64

kernel: $(READY)  ## compile the kernel anew, in the checkout
	@$(BIN)/python -m edge_agent.native.build

wheels: wheel-x86_64 wheel-aarch64  ## make wheels with the kernel for x86_64 and aarch64 boards, in dist/

# No isolation: the build calls the zig of $(VENV), with the setuptools of $(VENV).
wheel-x86_64 wheel-aarch64: wheel-%: $(READY)
	@$(BIN)/python -c 'import ziglang' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check ziglang
	@rm -rf build/lib build/bdist.*
	@SCALARFED_MACHINE=$* CC="$(abspath $(BIN)/python) -m ziglang cc -target $*-linux-gnu.2.17" \
	  $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*$*.whl
