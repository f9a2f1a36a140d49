#!/usr/bin/env bash
# The core of the Python tests on CPU kernels, binding and pybind11 module built with a sanitizer.
#   bash tools/run_sanitized_python.sh                           # ASan and UBSan
#   bash tools/run_sanitized_python.sh thread                    # TSan: Python threads on one layer
#   bash tools/run_sanitized_python.sh address,undefined tests/ops/test_linear.py -k float64
# Builds into build/sanitized-NAME of a copy, so that the installed module stays as it is. Python
# and torch are not instrumented, so the sanitizer's library is loaded before them.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
kind=${1:-address,undefined}
[ $# -eq 0 ] || shift
name=${kind//,/-}
copy=$repo/build/sanitized-$name

mkdir -p "$copy"
rm -rf "$copy"/{csrc,cmake,tests,tools,benchmarks,randlora_ext}  # files that are gone since
cp -rp setup.py pyproject.toml VERSION README.md LICENSE csrc cmake tests tools benchmarks "$copy"
cp -rp --parents $(git ls-files randlora_ext) "$copy"
cd "$copy"
RANDLORA_CUDA=0 RANDLORA_SANITIZE=$kind python setup.py -q build_ext --inplace >build.log 2>&1 ||
  { tail -30 build.log; exit 1; }

libraries=$(case $kind in *address*) echo libasan libubsan ;; *thread*) echo libtsan ;; esac)
# libstdc++ with them: the sanitizer looks for its __cxa_throw when it starts.
preload=$(for library in $libraries libstdc++; do g++ -print-file-name="$library.so"; done)
if [ $# -eq 0 ]; then
  case $kind in
    *address*) set -- tests/ops/test_{linear,autograd,weights,errors}.py \
      tests/ops/test_{nonfinite,properties,isa}.py \
      tests/basis/test_{packed,basis,basis_spec}.py tests/nn/test_layer.py \
      -k "not test_compiled_layer" ;;
    *thread*) set -- tests/ops/test_concurrency.py -k "(bits or drop or dense_b) and not -4]" ;;
  esac
fi
# Leaks are Python's and torch's own; soak.py looks for ours. TSan cannot see into libgomp, whose
# barriers it would take for missing: one OpenMP thread (no case of 4 torch threads), but several of
# Python's. ASan's stack for use after return is aligned to 32 bytes, and AVX-512 needs 64.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0
export PYTHONPATH=$copy PYTHONDONTWRITEBYTECODE=1
case $kind in *thread*) export OMP_NUM_THREADS=1 ;; esac
export LD_PRELOAD=${preload//$'\n'/ }
python - <<'PY'
import randlora_ext
assert "/build/sanitized-" in randlora_ext._C.__file__, randlora_ext._C.__file__
print("testing", randlora_ext._C.__file__)
PY
python -m pytest -p no:cacheprovider --capture=sys "$@" # a report goes past Python's stderr
