#!/bin/bash
# What a GPU makes of SparseKD, on a machine with CUDA, PyTorch and transformers and without network.
#
#   benchmarks/gpu.sh OUT SECONDS [WHEELS]
#
# OUT is a folder for rows and logs. Two thirds of the SECONDS are for benchmarks/gpu.py, whose rows are written as they
# come, the rest for those tests that choose their device by themselves. WHEELS is a folder with the wheels of what is
# missing there: of gguf and beartype, say.
set -u
mkdir -p "$1"
out=$(realpath "$1") seconds=$2 wheels=${3:-} root=$(cd "$(dirname "$0")/.." && pwd)
if [ -n "$wheels" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$out/site" "$wheels"/*.whl
fi
export PYTHONPATH=$out/site:$root/src HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
cd "$root" || exit
timeout $((seconds * 2 / 3)) python3 benchmarks/gpu.py "$out/gpu.jsonl" --seconds $((seconds * 2 / 3 - 20)) 2> "$out/gpu.log"
timeout $((seconds / 3)) python3 -m pytest -p no:cacheprovider -p no:benchmark -q --numprocesses auto --dist loadfile \
    --timeout 60 --maxfail 5 --tb=short tests/e2e/test_run.py tests/e2e/test_masked.py tests/teacher tests/distillation \
    tests/compression > "$out/tests.log" 2>&1
grep -E "^(FAILED|ERROR)" "$out/tests.log"
tail -3 "$out/tests.log"
