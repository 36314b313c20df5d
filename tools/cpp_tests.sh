#!/usr/bin/env bash
# tools/cpp_tests.sh [address] [thread]: the C++ tests with these sanitizers, or without one. CMake and Ninja in PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- none
for sanitizer in "$@"; do
    folder=build/cpp-$sanitizer
    cmake -G Ninja -S . -B "$folder" -DKORE_SANITIZE="${sanitizer/none/}" > /dev/null
    cmake --build "$folder" --parallel "${MAX_JOBS:-2}" > /dev/null
    ctest --test-dir "$folder" --output-on-failure
done
