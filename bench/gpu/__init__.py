"""`make gpu`: fifteen minutes on a CUDA device, used well; with the machine's own packages.

    __main__.py     the command line
    plan.py         the steps of a first run and of `make gpu AGAIN=1`, and how long each may take
    steps.py        runs them in order under one deadline; a failing one does not stop the rest
    process.py      a command within a time: told to stop at its end, then killed
    install.py      fastclip, built here or taken from a bundle of `make gpu-bundle`
    rates.py        what the card can do: copies, library products
    smoke.py        every engine against float64 on the device
    tiles.py        the Triton engine's tile candidates, in turns
    winners.py      the best of them: what the engine's table should say
    fp32.py         ways of multiplying fp32: as bf16 parts, in tf32
    cases.py        what is measured, the most important first
    rows.py         these cases by `bench.runner`, one group of them in a process
    kernels.py      the time of each kernel of a step
    counters.py     what Nsight Compute counts in three of them
    suite.py        the tests, on the device
    figures.py      how steps write the files that are no rows of the bench
    report.py       all of it on one page, the verdict last
    bundle/         what can be made before, on a machine without a card

Every step is a process of its own: a kernel that fails makes its process's device useless. What it
finds goes into a file of $OUT, or of bench/results, as it is found: a cut loses nothing.
"""
