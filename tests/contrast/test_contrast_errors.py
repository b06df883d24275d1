"""`contrast` refuses wrong arguments; an error states the rule, and what it got."""

from typing import Any

import pytest
import torch

from fastclip import contrast

X, Y = torch.ones(4, 3), torch.ones(5, 3)
IDS = torch.arange(4), torch.arange(5)
LABELS = torch.tensor([4, 0, 0, 3])
TAKE = r"labels take the place of offset, which must be 0, got "
REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "x no tensor": (TypeError, r"x must be a torch.Tensor, got list", {"x": [1.0]}),
    "integers": (TypeError, r"y must be float64, .*, got torch.int64", {"y": Y.long()}),
    "rank": (ValueError, r"x must be \(M, D\), got shape \(4,\)", {"x": X[:, 0]}),
    "width": (ValueError, r"must have one width D, got \(4, 3\) and \(5, 2\)", {"y": Y[:, :2]}),
    "empty": (ValueError, r"must not be empty", {"y": Y[:0]}),
    "offset": (TypeError, r"offset must be an int or None, got float", {"offset": 1.0}),
    "true offset": (TypeError, r"offset must be an int or None, got bool", {"offset": True}),
    "one tensor of ids": (TypeError, r"ids must be a pair of tensors", {"ids": IDS[0]}),
    "ids no tensor": (TypeError, r"y_ids must be a torch.Tensor", {"ids": (IDS[0], [1])}),
    "real ids": (TypeError, r"x_ids must be integers, got torch.float32", {"ids": (X[:, 0], Y)}),
    "few ids": (
        ValueError, r"y_ids must have an id for each row.*\(5,\), got \(4,\)",
        {"ids": (IDS[0], IDS[0])},
    ),
    "same_id": (ValueError, r"same_id must be one of .*, got 'ours'", {"same_id": "ours"}),
    "positive without ids": (ValueError, r"same_id='positive' needs ids", {"same_id": "positive"}),
    "margin": (
        TypeError, r"false_negative_margin must be a number or a tensor",
        {"false_negative_margin": "far"},
    ),
    "margins": (
        ValueError, r"false_negative_margin must have one element",
        {"false_negative_margin": torch.ones(4)},
    ),
    "key bias no tensor": (TypeError, r"key_bias must be a .*, got float", {"key_bias": 1.0}),
    "key bias of rows": (
        ValueError, r"key_bias must have a bias for each column.*\(5,\), got \(4,\)",
        {"key_bias": torch.ones(4)},
    ),
    "integral key bias": (
        TypeError, r"key_bias must be float64.*got torch.int64", {"key_bias": torch.arange(5)},
    ),
    "kind": (ValueError, r"kind must be one of 'softmax', 'sigmoid'.*, got 'far'", {"kind": "far"}),
    "nothing": (ValueError, r"rows or columns must be wanted", {"rows": False, "columns": False}),
    "backend": (ValueError, r"backend must be None or one of", {"backend": "warp"}),
    "budget": (ValueError, r"memory_budget must be a number of bytes", {"memory_budget": -1}),
    "scale": (ValueError, r"logit_scale must have one element", {"logit_scale": torch.ones(2)}),
    "labels, no tensor": (TypeError, r"labels must be a torch.Tensor, got list", {"labels": [4]}),
    "labels, real": (TypeError, r"labels must be integers, got torch.float32", {"labels": X[:, 0]}),
    "labels, bool": (TypeError, r"labels must be integers, got torch.bool", {"labels": LABELS > 0}),
    "labels, few": (
        ValueError, r"labels must have a column for each row.*\(4,\), got \(3,\)",
        {"labels": LABELS[:3]},
    ),
    "labels of columns": (
        ValueError, r"a column for each row.*\(4,\), got \(5,\)", {"labels": IDS[1]},
    ),
    "labels, elsewhere": (
        ValueError, r"labels must be on the features' device cpu, got meta",
        {"labels": LABELS.to("meta")},
    ),
    "labels, an offset": (ValueError, TAKE + "1", {"labels": LABELS, "offset": 1}),
    "labels, no offset": (ValueError, TAKE + "None", {"labels": LABELS, "offset": None}),
    "labels, negative": (
        ValueError, r"labels must be columns, 0 <= label < 5, got -1 to 3",
        {"labels": LABELS - 1},
    ),
    "labels, beyond": (
        ValueError, r"labels must be columns, 0 <= label < 5, got 1 to 5", {"labels": LABELS + 1},
    ),
    "labels, another id": (
        ValueError, r"a row and the key of its label must have one id, got 7 and 0 in row 2",
        {"labels": LABELS, "ids": (torch.tensor([4, 0, 7, 3]), IDS[1])},
    ),
    "labels of 8 bits, another id": (
        ValueError, r"a row and the key of its label must have one id, got 7 and 0 in row 2",
        {"labels": LABELS.to(torch.uint8), "ids": (torch.tensor([4, 0, 7, 3]), IDS[1])},
    ),
    "itself and labels": (
        ValueError, r"labels must be None without y: no row", {"y": None, "labels": LABELS},
    ),
    "itself and a margin": (
        ValueError, r"false_negative_margin must be None without y: no row",
        {"y": None, "false_negative_margin": 0.1},
    ),
    "itself and key_bias": (
        ValueError, r"key_bias must be None without y: no row",
        {"y": None, "key_bias": torch.ones(4)},
    ),
    "itself and an offset": (
        ValueError, r"without y .* offset must be 0 and rows True, got 1 and True",
        {"y": None, "offset": 1},
    ),
    "itself without rows": (
        ValueError, r"without y .* offset must be 0 and rows True, got 0 and False",
        {"y": None, "rows": False},
    ),
    "few ids of itself": (
        ValueError, r"x_ids must have an id for each row.*\(4,\), got \(5,\)",
        {"y": None, "ids": IDS[1]},
    ),
    "itself with ids of two sides": (
        ValueError, r"without y ids must be one tensor, got two that differ",
        {"y": None, "ids": (LABELS, LABELS + 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_arguments_are_refused(what: str) -> None:
    error, pattern, change = REFUSED[what]
    arguments = {"x": X, "y": Y, "logit_scale": 1.0} | change
    with pytest.raises(error, match=pattern):
        contrast(**arguments)
