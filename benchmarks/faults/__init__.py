"""The fault campaign: tiny jobs are killed, starved, damaged and disturbed, and go on; what they end in is compared.

    python -m benchmarks.faults --kills 800 --others 8 --out docs/results/robustness-faults.md

A job is survived if the same command, given again, ends in the same bytes as one that nothing disturbed, or if what was
damaged is refused in a sentence that names it. Anything else is printed, and the exit code is 1. Every process is
forked from one that has imported everything, so that a trial costs a second or two, not ten.
"""
