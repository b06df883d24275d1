"""`make gpu`: checks, times and tests on a CUDA device, with the machine's own packages.

    __main__.py     the command line
    plan.py         the steps of a first run and of `make gpu AGAIN=1`, and how long each may take
    steps.py        runs them in order under one deadline; a failing one does not stop the rest
    process.py      runs a command within a time limit: at the limit SIGINT, then SIGKILL
    install.py      fastclip, built here or taken from a bundle of `make gpu-bundle`
    rates.py        the card's rates: copies, library matmuls
    smoke.py        runs the smoke test: every engine against float64 on the device
    smoke_checks.py its problems and verdicts
    tiles.py        times the Triton engine's tile candidates in turns
    winners.py      the best of them, and which entries of the engine's table should change
    fp32.py         ways to multiply fp32: as bf16 parts, in tf32
    cases.py        the cases in groups, the most important first
    rows.py         measures one group of cases by `bench.measure.runner`
    kernels.py      the time of each kernel of a step
    counters.py     Nsight Compute's counters of three kernels
    suite.py        the command lines of the tests on the device
    figures.py      reads and writes the CSVs of a run besides the benchmark's rows
    report.py       the report on one page, with the verdict last
    bundle/         prepares what `make gpu` needs on a machine without a card

Every step is a process of its own, because a failing kernel makes the device unusable for its
process. Results are written to $OUT, or to bench/results, at once, so that a cut loses nothing.
"""
