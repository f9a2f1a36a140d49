#!/usr/bin/env bash
# The Python tests on the CUDA kernels, without a card: the CUDA library compiled for the CPU serves
# CPU tensors (CONTRIBUTING.md), so binding, checks, autograd and kernels are those of a card.
#   bash tools/cuda/run_python_tests.sh [pytest arguments]
# Needs CMake, g++ and the built extension; about three minutes on two cores. RANDLORA_CUDA_LIBRARY
# may name the library, if it has been built.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${RANDLORA_CUDA_LIBRARY:-}" ]; then
  cmake -S . -B build-cpp >/dev/null
  cmake --build build-cpp -j2 --target cuda_on_cpu_library >/dev/null
  RANDLORA_CUDA_LIBRARY=$PWD/build-cpp/librandlora_cuda_on_cpu.so
fi
export RANDLORA_CUDA_LIBRARY RANDLORA_CUDA_SERVES_CPU=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python -c "
import randlora_ext
status = randlora_ext.build_info()['cuda']
raise SystemExit(0 if status.endswith('on the CPU') else status)"

# What holds of the CPU kernels only, and why.
cpu_only=(
  # In 16 bits tensor cores take A', V and U rounded to 16 bits; the CPU keeps them in float32.
  tests/ops/test_weights.py::test_16_bit_results_are_rounded_once
  'tests/ops/test_weights.py::test_one_rounding_of_the_sum[torch.bfloat16'
  'tests/ops/test_weights.py::test_one_rounding_of_the_sum[torch.float16'
  'tests/peft/test_peft.py::test_adapters_err_at_most_twice_as_much_as_stock[fp32'
  # Products with gamma are torch's, which on the CPU may add token by token (chunks.cpp);
  # tests/gpu has gradients of 8,192 tokens.
  'tests/ops/test_linear.py::test_error_rule_with_many_tokens[hadamard'
  # Few tokens have tiles of their own, whose sums have another order.
  tests/ops/test_determinism.py::test_a_token_does_not_depend_on_its_batch
  # Indices are trusted on a card: to look at them the host would have to wait.
  tests/ops/test_operator_errors.py::test_packing_operators
  # Threads are nothing to a card; tests/gpu compares two runs.
  tests/ops/test_determinism.py::test_linear
  # The CPU's memory.
  tests/ops/test_autograd.py::test_scratch_does_not_grow_with_tokens
  # Half a minute; tests/cuda has smaller ones.
  tests/basis/test_packed.py::test_the_format_of_long_lines
)
deselected=()
for test in "${cpu_only[@]}"; do deselected+=(--deselect "$test"); done

# Not here: what tests Python alone or the CPU's instruction sets.
RANDLORA_GPU_RUN_DRY=1 python -m pytest -q -n 2 -p no:cacheprovider "${deselected[@]}" "$@" \
  tests/project/test_gpu_run_dry.py::test_the_whole_dry_run tests/gpu \
  tests/ops/test_{linear,weights,autograd,experts}.py \
  tests/ops/test_{nonfinite,determinism,errors,operator_errors}.py \
  tests/basis/test_{basis_spec,packed}.py \
  tests/nn/test_{layer,merge}.py tests/peft/test_peft{,_adapters,_rows,_changes}.py
