"""The figures that the paper prints (tables 1 to 3), in percent, to stand beside one's own.

Figure 6 is drawn without numbers; those of its points that are in table 1 (shares 1/2 and 1) are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

SHARES = ("1/8", "1/4", "1/2", "1")
DATASETS = ("potsdam", "vaihingen", "gid")
OURS = "Ours"
METHODS = {"mean_teacher": "Mean Teacher", "cps": "CPS", "dst_cbc": "DST-CBC"}
NETWORKS = {"unet": "U-Net", "attention_unet": "Attention U-Net", "u2net": "U2-Net"}  # of its supervised rows
# (channel attention, sharpening) of its own method: table 3.
ABLATIONS = {
    ("false", "none"): "Baseline",
    ("true", "none"): "Baseline + CA",
    ("false", "s1"): "Baseline + sharpen (s1)",
    ("false", "s2"): "Baseline + sharpen (s2)",
    ("false", "both"): "Baseline + sharpen",
    ("true", "both"): OURS,
}

_Row = tuple[float | None, ...]
TABLE_1: dict[str, dict[str, _Row]] = {
    "potsdam": {
        "U-Net": (None, None, None, 78.2),
        "Attention U-Net": (None, None, None, 81.4),
        "U2-Net": (None, None, None, 81.3),
        "Mean Teacher": (70.5, 72.1, 76.1, None),
        "CPS": (73.4, 75.2, 77.8, None),
        "DST-CBC": (73.3, 75.4, 78.3, None),
        "Ours": (71.2, 74.9, 80.5, 82.1),
    },
    "vaihingen": {
        "U-Net": (None, None, None, 76.8),
        "Attention U-Net": (None, None, None, 78.1),
        "U2-Net": (None, None, None, 78.3),
        "Mean Teacher": (70.2, 72.1, 73.8, None),
        "CPS": (71.7, 72.8, 74.0, None),
        "DST-CBC": (72.3, 73.4, 74.9, None),
        "Ours": (71.0, 73.5, 77.4, 78.4),
    },
    "gid": {
        "U-Net": (None, None, None, 79.8),
        "Attention U-Net": (None, None, None, 81.1),
        "U2-Net": (None, None, None, 81.2),
        "Mean Teacher": (70.9, 72.5, 75.8, None),
        "CPS": (72.6, 75.7, 76.4, None),
        "DST-CBC": (72.4, 75.1, 76.5, None),
        "Ours": (72.1, 76.3, 81.8, 82.1),
    },
}
# By the class names of dctc's recipes.
TABLE_2: dict[str, dict[str, _Row]] = {
    "potsdam": {
        "impervious_surface": (75.2, 77.1, 83.6, 85.5),
        "building": (76.9, 81.8, 86.3, 87.3),
        "low_vegetation": (67.1, 71.8, 76.4, 78.7),
        "tree": (71.7, 74.8, 81.6, 82.3),
        "car": (69.5, 73.1, 78.8, 80.7),
        "clutter": (66.9, 70.8, 76.3, 77.9),
    },
    "vaihingen": {
        "impervious_surface": (73.5, 76.9, 79.4, 81.9),
        "building": (77.9, 81.0, 83.4, 85.2),
        "low_vegetation": (70.5, 71.6, 76.2, 75.9),
        "tree": (72.1, 73.9, 79.1, 78.3),
        "car": (59.2, 62.2, 66.5, 68.5),
        "clutter": (72.8, 75.4, 79.8, 80.6),
    },
    "gid": {
        "farmland": (73.7, 77.6, 82.5, 84.1),
        "forest": (79.2, 83.0, 88.2, 87.7),
        "built_up": (77.2, 81.2, 86.5, 86.6),
        "meadow": (59.5, 64.4, 70.9, 71.5),
        "water": (71.1, 75.3, 80.9, 80.5),
    },
}
TABLE_3: dict[str, dict[str, float]] = {
    "potsdam": {
        "Baseline": 75.8,
        "Baseline + CA": 76.3,
        "Baseline + sharpen (s1)": 77.2,
        "Baseline + sharpen (s2)": 77.4,
        "Baseline + sharpen": 78.1,
        "Ours": 80.5,
    },
    "vaihingen": {
        "Baseline": 72.3,
        "Baseline + CA": 72.9,
        "Baseline + sharpen (s1)": 73.5,
        "Baseline + sharpen (s2)": 73.4,
        "Baseline + sharpen": 74.6,
        "Ours": 77.4,
    },
    "gid": {
        "Baseline": 75.3,
        "Baseline + CA": 76.5,
        "Baseline + sharpen (s1)": 77.2,
        "Baseline + sharpen (s2)": 77.0,
        "Baseline + sharpen": 79.1,
        "Ours": 81.8,
    },
}


def row_of(method: str, network: str, params: Mapping[str, str]) -> str | None:
    """What the paper calls a run by its method, network and parameters (``method.attention``, ``method.sharpen``).

    A sweep's rows have the paper's names already.
    """
    if method == "supervised":
        return NETWORKS.get(network) if params.get("method.attention", "false") == "false" else None
    if network != "unet":
        return None
    if method == "dctc":
        return ABLATIONS.get((params.get("method.attention", "true"), params.get("method.sharpen", "both")))
    return METHODS.get(method)


def printed(dataset: str, row: str, share: str) -> float | None:
    """The paper's mIoU of a method (table 1) or an ablation (table 3), in percent; None where it gives none."""
    column = _column(share)
    if row in TABLE_1[dataset] and column is not None:
        return TABLE_1[dataset][row][column]
    return TABLE_3[dataset].get(row) if column == SHARES.index("1/2") else None


def printed_class(dataset: str, name: str, share: str) -> float | None:
    """The paper's IoU of a class in its own method (table 2), in percent; None where it gives none."""
    column = _column(share)
    return None if column is None or name not in TABLE_2[dataset] else TABLE_2[dataset][name][column]


def _column(share: str) -> int | None:
    try:
        return SHARES.index(str(Fraction(share)))
    except (ValueError, ZeroDivisionError):
        return None
