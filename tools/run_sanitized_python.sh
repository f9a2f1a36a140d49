#!/usr/bin/env bash
# The core of the Python tests on CPU kernels, binding and pybind11 module built with a sanitizer.
#   bash tools/run_sanitized_python.sh                           # ASan and UBSan
#   bash tools/run_sanitized_python.sh thread                    # TSan: Python threads on one layer
#   bash tools/run_sanitized_python.sh address,undefined tests/ops/test_linear.py -k float64
# Builds in build/sanitized-KIND, a copy of what git tracks, so that the installed module stays as
# it is. Python and torch are not instrumented, so the sanitizer's library is loaded before them.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizers=${1:-address,undefined}
[ $# -eq 0 ] || shift
copy=$PWD/build/sanitized-${sanitizers//,/-}
mkdir -p "$copy"
rm -rf "$copy"/{csrc,tests,randlora_ext}  # files that are gone since
git ls-files -z | xargs -0 cp --parents -pt "$copy"
cd "$copy"
RANDLORA_CUDA=0 RANDLORA_SANITIZE=$sanitizers python setup.py -q build_ext --inplace >build.log 2>&1 ||
  { tail -30 build.log; exit 1; }

# Leaks are Python's and torch's own; soak.py looks for ours. TSan cannot see into libgomp, whose
# barriers it would take for missing: one OpenMP thread (no case of 4 torch threads), but several of
# Python's. ASan's stack for use after return is aligned to 32 bytes, and AVX-512 needs 64.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0
export PYTHONPATH=$copy PYTHONDONTWRITEBYTECODE=1
case $sanitizers in
  *thread*)
    libraries=libtsan tests="tests/ops/test_concurrency.py"
    choice="(bits or drop) and not -4]"
    export OMP_NUM_THREADS=1 ;;
  *)
    libraries="libasan libubsan" choice=""
    tests=$(echo tests/ops/test_{linear,autograd,weights,errors,operator_errors}.py \
      tests/ops/test_{nonfinite,properties,isa}.py \
      tests/basis/test_{packed,basis,basis_spec}.py tests/nn/test_{layer,merge}.py) ;;
esac
[ $# -gt 0 ] || set -- $tests -k "$choice"
# libstdc++ with them: the sanitizer looks for its __cxa_throw when it starts.
preload=$(for name in $libraries libstdc++; do g++ -print-file-name=$name.so; done | xargs)
export LD_PRELOAD=$preload
python -c "import randlora_ext; assert '/build/sanitized-' in randlora_ext._C.__file__"
python -m pytest -p no:cacheprovider --capture=sys "$@"  # a report goes past Python's stderr
