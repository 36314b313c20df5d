#!/usr/bin/env bash
# tools/build_wheels.sh PYTHON OUT KIND...: a wheel for each of none, cpu, cuda; manylinux tags where Linux allows them.
set -euo pipefail
bin=$(cd "$(dirname "$1")" && pwd)
python=$bin/$(basename "$1") out=$2
shift 2
mkdir -p "$out"
for kind in "$@"; do
    fresh=$(mktemp -d)
    begin=$SECONDS
    KORE_BUILD=$kind "$python" -m pip wheel -q --no-deps -w "$fresh" .
    if [ "$kind" != none ] && [ "$(uname)" = Linux ]; then
        PATH="$bin:$PATH" "$bin/auditwheel" repair -w "$fresh/repaired" "$fresh"/*.whl
        rm "$fresh"/*.whl
        mv "$fresh"/repaired/*.whl "$fresh"
    fi
    for wheel in "$fresh"/*.whl; do
        echo "$kind: $(basename "$wheel"), $(stat -c %s "$wheel") bytes, $((SECONDS - begin)) s"
    done
    mv "$fresh"/*.whl "$out"
    rm -rf "$fresh"
done
