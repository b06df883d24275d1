"""The benchmark of fastclip: `python -m bench --help`, from the root of the repository.

    losses.py     the registry of losses: everything that the benchmark must know about each.
                  CLIP and SigLIP are in every plan; `--family` measures the others
    case.py       a case (a loss, shape, dtype, scale) and its inputs
    cases.py      the plans of cases
    methods/      the methods compared, and the matmul passes that each needs
        registry.py      every method: how it is made for a case
        step.py          a step of a method, also as a CUDA graph
        passes.py        the passes that methods need
        dense.py         the losses in plain PyTorch
        on_contrast.py   the losses written on `fastclip.contrast`
        open_clip.py     open_clip's losses, even if the installed torchvision does not load
        peers.py         published losses of other projects, if they are installed and can run
        rectangular.py   CLIP's loss on more columns than rows, on the low-level operators
    measure/      measurements, case by case, written to the CSV of this machine
        runner.py        runs a plan
        timing.py        medians of interleaved runs, and the GEMM limit in the same run
        memory.py        peak memory; on a CPU in one process for each case and method
        truth.py         loss and gradients in float64, blockwise
        truth_of_lines.py    the same of the family
        traffic.py       the bytes that a rank sends
        progress.py      the progress bar
    report/       that CSV: its columns, tables, goals and picture
    distributed/  losses across processes; their CSVs are in results/distributed
    scale/        a model of thousands of GPUs, and its page
    gpu/          `make gpu`: checks, times and tests on a CUDA device, step by step

It is not part of the package: nothing in `fastclip` imports it.
"""
