#!/usr/bin/env bash
# Table 1's protocol: every recipe, MXFP4 and MXINT4, three seeds. Resumes; run it again after an interruption.
#
#   benchmarks/table1.sh demo                                  the model and the texts that ship with latmix
#   benchmarks/table1.sh stories260K ../shared/data            a model trained elsewhere, on its own kind of text
#
# Writes docs/results/table1-MODEL-FORMAT.md; the cells are kept in comparisons/.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
case ${1:-} in
    demo) arguments=(src/latmix/assets/demo-model) ;;
    stories260K)
        arguments=("$2/models/stories260K" --text "$2/text/tinystories.txt" --split 0.7 --separator '\n\n' --window 256
            --set calibration.windows=130 --set calibration.held_out=30)
        ;;
    *) echo "usage: benchmarks/table1.sh demo | stories260K DATA" >&2; exit 2 ;;
esac
for format in mxfp4:scale=even mxint4; do
    out=comparisons/$1-${format%%:*}
    latmix compare "${arguments[@]}" --seeds 3 --set weights=$format --set activations=$format --out "$out" || [ $? -eq 1 ]  # a failed cell is in the table
    cp "$out/table.md" "docs/results/table1-$1-${format%%:*}.md"
done
