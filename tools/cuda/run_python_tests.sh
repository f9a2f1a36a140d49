#!/usr/bin/env bash
# The Python tests on the CUDA kernels, without a card: the CUDA library compiled for the CPU serves
# CPU tensors (docs/cuda-on-cpu.md), so binding, checks, autograd and kernels are those of a card.
#   bash tools/cuda/run_python_tests.sh [pytest arguments]
# Needs CMake, g++ and the built extension; about four minutes on two cores. RANDLORA_CUDA_LIBRARY
# may name the library, if it has been built.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${RANDLORA_CUDA_LIBRARY:-}" ]; then
  cmake -S . -B build-cpp >/dev/null
  cmake --build build-cpp -j2 --target cuda_on_cpu_library >/dev/null
  RANDLORA_CUDA_LIBRARY=$PWD/build-cpp/librandlora_cuda_on_cpu.so
fi
export RANDLORA_CUDA_LIBRARY RANDLORA_CUDA_SERVES_CPU=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1  # two processes on two cores
python -c "
import randlora_ext
status = randlora_ext.build_info()['cuda']
raise SystemExit(0 if status.endswith('on the CPU') else status)"

# What holds of the CPU kernels only, and why.
cpu_only=(
  # In 16 bits tensor cores take A', V and U rounded to 16 bits; the CPU keeps them in float32.
  tests/ops/test_delta_weight.py::test_16_bit_results_are_rounded_once
  tests/ops/test_delta_weight.py::test_raw_operators
  'tests/ops/test_merged_weight.py::test_one_rounding_of_the_sum[dtype2'
  'tests/ops/test_merged_weight.py::test_one_rounding_of_the_sum[dtype3'
  'tests/peft/test_peft.py::test_adapters_err_at_most_twice_as_much_as_stock[fp32'
  # The scale multiplies V, so a NaN there reaches connected outputs only.
  tests/ops/test_nonfinite.py::test_scaling
  # Few tokens have kernels of their own, which add in another order.
  tests/ops/test_determinism.py::test_a_token_does_not_depend_on_its_batch
  # Indices are trusted on a card: to look at them the host would have to wait.
  tests/ops/test_errors.py::test_packing_operators
  # Threads are nothing to a card; tests/gpu compares two runs.
  tests/ops/test_determinism.py::test_linear
  tests/ops/test_hadamard.py::test_any_number_of_threads_gives_the_same_bits
  # Scratch of the CUDA kernels grows with the tokens, up to a chunk of them.
  tests/ops/test_autograd.py::test_scratch_does_not_grow_with_tokens
  # Twenty seconds each; tests/gpu has a smaller one.
  tests/basis/test_packed.py::test_wide_lists
)
deselected=()
for test in "${cpu_only[@]}"; do deselected+=(--deselect "$test"); done
run=(python -m pytest -q -p no:cacheprovider "${deselected[@]}" "$@")

# Side by side: operators and what stands on them; the GPU tests, B as a dense matrix, and the dry
# run of benchmarks/gpu_run.py. Not here: test_isa (the CPU's instruction sets), test_smollm2,
# test_docs (blocks that measure CPU memory), builds, and statistics of the specification.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
(
  "${run[@]}" tests/gpu || status=1
  RANDLORA_B_SIDE=dense "${run[@]}" tests/ops/test_linear.py || status=1
  RANDLORA_GPU_RUN_DRY=1 "${run[@]}" tests/project/test_gpu_run_dry.py || status=1
  exit $status
) >"$log" 2>&1 &
others=$!
"${run[@]}" -k "not wide" tests/ops/test_{linear,delta_weight,merged_weight,scaled_basis}.py \
  tests/ops/test_{hadamard,dense,autograd,nonfinite,determinism,errors}.py \
  tests/basis/test_{basis,basis_spec,packed,slice}.py tests/nn/test_{layer,layer_merge,apply}.py \
  tests/peft/test_{peft,peft_adapters,peft_activation}.py || status=1
wait "$others" || status=1
cat "$log"
exit $status
