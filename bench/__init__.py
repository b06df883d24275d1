"""The benchmark of fastclip: `python -m bench --help`, from the root of the repository.

    losses.py       every loss: all that is asked about one, and the list of them
    dense.py        the losses in plain PyTorch
    on_contrast.py  the losses written on `fastclip.contrast`
    cases.py        what is measured: losses, shapes, dtypes, scales, and their inputs
    baselines.py    how: every method, with the matmul passes it is due
    open_clip.py    open_clip's losses, also beside a torchvision that does not load
    rectangular.py  the same for a block with more columns than rows, on the low-level operators
    peers.py        published losses of other projects, where they are installed and can run
    truth.py        loss and gradients in float64, blockwise
    timing.py       medians of interleaved runs by the device's clock, and the GEMM limit meanwhile
    memory.py       the peak of memory, on a CPU in one process for each case and method
    runner.py       all of it, case by case, into the CSV of this machine
    progress.py     how far it has come
    results.py      that CSV: its columns, the machine's name
    table.py goals.py gpu_goals.py plot.py markdown.py   that CSV as tables and as a picture
    distributed/    losses across processes; results/distributed has its CSVs
    traffic.py      the bytes that a rank sends
    scale.py scale_page.py   a model of thousands of GPUs, and its page
    gpu/            `make gpu`: checks, times and tests on a CUDA device, step by step

It is no part of the package: nothing in `fastclip` imports it.
"""
