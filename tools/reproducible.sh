#!/usr/bin/env bash
# tools/reproducible.sh PYTHON OUT KIND...: builds the kinds again and compares with the wheels in OUT.
#
# From a copy of the sources elsewhere; cuda in this folder, from nothing, as nvcc hashes its path into names.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") out=$(realpath "$2")
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q . "$work/sources"
for kind in "$@"; do
    folder=$work/sources
    if [ "$kind" = cuda ]; then
        folder=$PWD
        rm -rf build/temp.* build/lib.* build/bdist.*
    fi
    (cd "$folder" && tools/build_wheels.sh "$python" "$work/again" "$kind")
done
status=0
for wheel in "$work"/again/*.whl; do
    name=$(basename "$wheel")
    if cmp -s "$wheel" "$out/$name"; then
        echo "$name: the same, sha256 $(sha256sum "$wheel" | cut -d' ' -f1)"
    else
        echo "$name: differs from $out/$name"
        status=1
    fi
done
exit $status
