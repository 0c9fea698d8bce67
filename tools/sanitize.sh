#!/usr/bin/env bash
# Builds the CPU engine with address and undefined-behaviour sanitizers, then with the thread sanitizer, each in a
# folder of its own, and runs the engine's tests under them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
site=$($python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
tests=(tests/test_engine_bits.py tests/test_codecs.py tests/test_codecs_16_bits.py tests/test_draws.py
  tests/test_formats.py tests/test_formats_drift.py tests/test_formats_refused.py tests/test_layouts.py
  tests/test_clipping.py tests/test_clipping_option.py tests/test_exact_norm.py tests/test_statistics.py
  tests/test_averages_bits.py tests/test_stochastic_weights.py tests/test_cautious_decay.py
  tests/test_atomic.py tests/test_atomic_interrupted.py tests/test_caches.py tests/test_caches_inputs.py
  tests/test_concurrency.py)

run() {  # NAME SANITIZERS LIBRARY PYTEST-ARGUMENT...
  local name=$1 sanitizers=$2 library=$3
  shift 3
  local target=build/sanitize-$name
  rm -rf "$target"
  $python -m pip install -q --no-build-isolation --no-deps --target "$target" \
    -C build-dir="build/cmake-$name" -C cmake.define.LUCID_SANITIZE="$sanitizers" \
    -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON .
  echo "== $sanitizers"
  # -S leaves the editable install out; the address space is not randomised since GCC 12's thread sanitizer cannot
  # place its shadow otherwise. pytest must not catch what a sanitizer says.
  env PYTHONPATH="$target:$site" LD_PRELOAD="$(c++ -print-file-name="$library") $(c++ -print-file-name=libstdc++.so)" \
    setarch "$(uname -m)" -R $python -S -m pytest -p no:cacheprovider --timeout 1800 --capture=sys "$@"
}

export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# The address sanitizer keeps freed memory for a while.
run address address,undefined libasan.so "${tests[@]}" tests/test_fsdp.py -k "not leave_nothing_behind" "$@"
export TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:report_signal_unsafe=0:suppressions=$PWD/tools/tsan-suppressions.txt
# The thread sanitizer cannot follow threads that a forked child starts ("dup thread with used id").
run thread thread libtsan.so "${tests[@]}" -k "not forked_child and not child_of_a_child and not middle" "$@"
