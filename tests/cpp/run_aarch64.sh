#!/usr/bin/env bash
# The CPU kernels compiled for aarch64, and their C++ tests under qemu's user emulation. Not part of
# .ci/run: cross compiler and emulator are 300 MB.
#   apt-get install g++-aarch64-linux-gnu qemu-user
#   bash tests/cpp/run_aarch64.sh [BUILD_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build-aarch64}
cmake -S . -B "$build" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu" >/dev/null
cmake --build "$build" --target cpu_tests -j"${MAX_JOBS:-2}"
ctest --test-dir "$build" --output-on-failure -E '^(cuda|symbols)_'
