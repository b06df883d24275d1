"""The README and the pages of docs: their code runs, links resolve, variables are listed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from support.installation import ROOT
from torch import nn

from bench.__main__ import main
from fastclip import clip_loss, kinds, reference

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
N, D = 20, 8


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


class Towers(nn.Module):
    """A model whose two towers are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(D, D)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.matrix(images), self.matrix(texts), self.scale


class Embeds(Towers):
    """Returns what transformers' CLIPModel returns, as far as pages use it."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, Any]:
        x, y, _ = super().forward(pixel_values, input_ids)
        return {"logits_per_image": x @ y.T, "image_embeds": x, "text_embeds": y}


def names() -> dict[str, Any]:
    """Returns the names that the code of the pages uses without defining them."""
    torch.manual_seed(0)
    x, y, queue = (torch.randn(k, D, requires_grad=True) for k in (N, N, 33))
    return {
        "torch": torch, "F": F, "x": x, "y": y, "image_features": x, "text_features": y,
        "queue": queue, "logit_scale": torch.tensor(2.0, requires_grad=True),
        "labels": torch.arange(N) // 3, "clip_loss": clip_loss, "model": Towers(),
        "images": x.detach(), "texts": y.detach(), "start": 3, "stop": 9,
        "clip": Embeds(), "batch": {"pixel_values": x.detach(), "input_ids": y.detach()},
        "image_tower": nn.Linear(D, D), "text_tower": nn.Linear(D, D),
    }  # fmt: skip


def run(page: Path) -> dict[str, Any]:
    """Runs the code of a page in order and returns the names it defines."""
    found = names()
    for code in code_of(page):
        exec(code, found)
    return found


@pytest.fixture(autouse=True)
def without_new_kinds() -> Iterator[None]:
    """Removes the kinds that a page registers."""
    before = dict(kinds.KINDS)
    yield
    kinds.KINDS.clear()
    kinds.KINDS.update(before)


@pytest.mark.parametrize("page", [p for p in PAGES if code_of(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    run(page)


def test_these_pages_have_code() -> None:
    assert {page.name for page in PAGES if code_of(page)} == {
        "README.md", "adding-a-loss.md", "big-batches.md", "distributed.md", "losses.md",
        "reference-model.md", "retrieval.md",
    }  # fmt: skip


def test_losses_written_on_contrast_are_the_dense_ones() -> None:
    found = run(ROOT / "docs/adding-a-loss.md")
    x, y, queue, scale = (found[k].detach() for k in ("x", "y", "queue", "logit_scale"))
    logits, diagonal = scale * x @ y.T, torch.arange(N)
    negatives = logits.masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
    same = found["labels"][:, None] == found["labels"]
    of_positives = (logits * same).sum(1) / same.sum(1)
    signed = (1 - 2 * torch.eye(N)) * logits
    expected = {
        "clip": reference.clip_loss(x, y, scale),
        "info_nce": F.cross_entropy(logits, diagonal),
        "decoupled": (negatives.logsumexp(1) - logits.diagonal()).mean(),
        "with_queue": torch.cat((negatives, scale * x @ queue.T), 1).logsumexp(1),
        "supervised": (logits.logsumexp(1) - of_positives).mean(),
        "loss": F.relu(1 + signed).square().sum() / N,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-5, atol=1e-5)
        found[name].sum().backward(retain_graph=True)
    assert all(found[k].grad is not None for k in ("x", "y", "queue", "logit_scale"))


def test_the_losses_of_the_page_of_losses_are_the_dense_ones() -> None:
    found = names()
    for code in code_of(ROOT / "docs/losses.md"):
        exec(code, found)
        if "def moco_loss" in code:
            exec("first = bank.clone()\nfirst_loss = moco_loss(x, y)", found)
    x, y, scale = (found[k].detach() for k in ("x", "y", "logit_scale"))
    q, k = F.normalize(x, dim=1), F.normalize(y, dim=1)
    own = torch.arange(N)
    with_batch = F.cross_entropy(q @ torch.cat((k, found["first"])).T / 0.2, own)
    positive = (q * k).sum(1, keepdim=True)
    alone = torch.cat((positive, q @ found["bank"].T), 1) * 5
    logits, others = scale * x @ y.T, ~torch.eye(N, dtype=torch.bool)
    within = [(scale * t @ t.T).masked_fill(~others, -torch.inf) for t in (x, y)]
    every = torch.cat((logits, logits.T, *within), 1).logsumexp(1)
    teacher = 10 * found["teacher_x"] @ found["teacher_y"].T
    similarities = found["teacher_x"] @ found["teacher_y"].T
    farther = (similarities > similarities.diagonal()[:, None]) & others
    expected = {
        "first_loss": with_batch,
        "moco": F.cross_entropy(alone, own * 0),
        "gte": (every - logits.diagonal()).mean(),
        "distilled": -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean(),
        "guided": F.cross_entropy(logits.masked_fill(farther, -torch.inf), own),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-5, atol=1e-5)


def test_the_readmes_losses_agree() -> None:
    found = run(ROOT / "README.md")
    torch.testing.assert_close(found["loss"], reference.clip_loss(*(
        found[k].detach() for k in ("x", "y", "logit_scale")
    )))  # fmt: skip
    torch.testing.assert_close(found["clip"].float(), reference.clip_loss(*(
        found[k].detach() for k in ("x", "y", "logit_scale")
    )))  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


# Torch, Python and the shell read these; our code only sets or passes them on.
PASSED_ON = {"OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "CC", "PATH",
             "PIP_BREAK_SYSTEM_PACKAGES", "PIP_DISABLE_PIP_VERSION_CHECK", "SHELL"}  # fmt: skip


def variables() -> set[str]:
    """Returns the environment and make variables that the sources read or set."""
    files = [ROOT / "setup.py", ROOT / "tests/conftest.py", ROOT / "tests/support/peers.py"]
    for folder in ("fastclip", "triton_kernels", "csrc", "bench"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp")]
    found: set[str] = set()
    for path in files:
        text = path.read_text()
        found |= set(re.findall(r"(?:environ|getenv)[^\n]{0,12}?[\"']([A-Z][A-Z_0-9]+)[\"']", text))
        found |= set(re.findall(r"[\"'](FASTCLIP_[A-Z_0-9]+)[\"']", text))
        if "torchelastic" in text:  # reads a list of torchrun's variables
            found |= set(re.findall(r"\"((?:LOCAL_)?(?:RANK|WORLD_SIZE)|TORCHELASTIC_\w+)\"", text))
    makefile = (ROOT / "Makefile").read_text()
    found |= set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    found |= set(re.findall(r"\$\(if \$\(([A-Z_]+)\)", makefile))
    # Macros of the compiled module's build are not variables.
    built = [path for path in files if path.is_relative_to(ROOT / "csrc") and path.suffix != ".py"]
    csrc = "".join(path.read_text() for path in built)
    macros = {name for name in found if re.search(rf'(?<!"){name}\b', csrc)}
    return found - PASSED_ON - macros


def test_every_variable_is_on_the_page_of_the_environment() -> None:
    page = (ROOT / "docs/environment.md").read_text()
    listed = {
        name
        for cell in re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)
        for name in re.findall(r"`([A-Z][A-Z_0-9]+)`", cell)
    }
    found = variables()
    assert {"FASTCLIP_GPU", "FASTCLIP_CPU", "FASTCLIP_CUDA", "PIP_ARGS", "AGAIN"} <= found
    assert found - listed == set(), "not on the page"
    # Torch reads the first one, and the CPU engine follows torch; Triton reads the second.
    assert listed - found == {"ATEN_CPU_CAPABILITY", "CC"}, "nothing reads it"


def test_generated_tables_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    pages = (
        "benchmarks", "benchmarks-distributed", "benchmarks-family", "retrieval",
        "sentence-transformers",
    )  # fmt: skip
    generated = "README.md", *(f"docs/{page}.md" for page in pages)
    (tmp_path / "docs").mkdir()
    for page in generated:
        (tmp_path / page).write_text((ROOT / page).read_text())
    assert main(["readme", "--pages", str(tmp_path)]) == 0
    for page in generated:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), (
            "run `python -m bench readme`"
        )
