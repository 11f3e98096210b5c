"""Beside the tables of runs: the paper's figures, the page, figure 6, predictions, the command as typed."""

from __future__ import annotations

import io
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dctc.cli import app
from dctc.tracking import paper
from dctc.tracking.charts import figure6, write_figure6
from dctc.tracking.compare import compare
from dctc.tracking.histories import histories
from dctc.tracking.page import Extras, page
from dctc.tracking.panels import panels
from dctc.tracking.tables import markdown
from shards.errors import InputError
from tests.stored import Store, printed

# ---- the paper's figures


@pytest.mark.parametrize("dataset", paper.DATASETS)
def test_the_papers_table_1_is_the_mean_of_its_table_2(dataset: str) -> None:
    for column, share in enumerate(paper.SHARES):
        mean = statistics.fmean(row[column] or math.nan for row in paper.TABLE_2[dataset].values())
        assert paper.printed(dataset, "Ours", share) == pytest.approx(mean, abs=0.0501)
    assert paper.printed(dataset, "Ours", "0.5") == paper.TABLE_3[dataset]["Ours"]
    assert paper.printed(dataset, "Baseline", "1/2") == paper.TABLE_3[dataset]["Baseline"]
    assert paper.printed(dataset, "Baseline", "1/4") is None
    assert paper.printed(dataset, "U-Net", "1/2") is None


def test_the_papers_figure_and_the_difference_stand_beside_each_cell(store: Store) -> None:
    store.add("dctc", "1/8", 0, s1=0.722)
    store.add("dctc", "10%", 0, s1=0.6)
    (table,) = compare(store.uri, store.name, beside="potsdam")
    assert str(table.cells["dctc", "s1", "1/8"]) == "72.2 (1), paper 71.2, +1.0"
    assert str(table.cells["dctc", "s1", "1/10"]) == "60.0 (1)"


def test_the_papers_row_of_a_run_is_by_its_method_network_and_switches(store: Store) -> None:
    for network, score in (("unet", 0.1), ("attention_unet", 0.2), ("u2net_small", 0.3)):
        store.add("supervised", "1", 0, tags={"network": network}, s1=score)
    for attention, sharpen in (("true", "both"), ("false", "s1")):
        switches = {"method.attention": attention, "method.sharpen": sharpen}
        store.add("dctc", "1/2", 0, tags={"network": "unet"}, params=switches, s1=0.5)
    (table,) = compare(store.uri, store.name, beside="vaihingen")
    printed = {row: cell.printed for (row, _, _), cell in table.cells.items()}
    assert printed == {
        "supervised, unet": 76.8,
        "supervised, attention_unet": 78.1,
        "supervised, u2net_small": None,
        "dctc, unet [method.attention=true, method.sharpen=both]": 77.4,
        "dctc, unet [method.attention=false, method.sharpen=s1]": 73.5,
    }


def test_variants_that_the_paper_lacks_stand_beside_none_of_its_figures(store: Store) -> None:
    for update in ("fused", "turns"):
        store.add("dctc", "1/2", 0, params={"method.update": update}, s1=0.5)
    (table,) = compare(store.uri, store.name, beside="gid")
    assert [cell.printed for cell in table.cells.values()] == [None, None]
    assert table.notes[-1] == "the paper has no figure for any of these cells (gid)"


# ---- names, in a terminal


@pytest.mark.parametrize("name", ["a [bold]b[/bold]", "broken [/] markup", "[red]"])
def test_brackets_in_names_are_no_markup(store: Store, name: str) -> None:
    for rounds in ("1", "2"):
        store.add(name, "1/2", 0, params={"schedule.rounds": rounds}, s1=0.5)
    (table,) = compare(store.uri, store.name)
    text = " ".join(printed(table).split())
    assert f"{name} [schedule.rounds=1]" in text
    assert f"{name}: its runs differ in schedule.rounds" in text


# ---- the page


class Reader(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '<script>alert("x")</script>'


def test_the_page_is_whole_in_itself_and_no_name_can_break_it(store: Store) -> None:
    pseudo = {f"train/pseudo/s1/{key}": [0.1, 0.2, 0.3] for key in ("miou", "iou/car")}
    for share, score in (("1/8", 0.5), ("1/2", 0.6)):
        store.add(HOSTILE, share, 0, metrics=pseudo | {"train/dying/s1": [0.0, 2.0]}, s1=score)
        store.add("supervised", share, 0, s1=score - 0.1)
    store.add("supervised", "1", 0, s1=0.7)
    (table,) = compare(store.uri, store.name)
    curves = histories(store.uri, table)
    assert [c.caption for c in curves if HOSTILE in c.caption][:3] == [
        f"{HOSTILE}, share 1/8: mIoU on unlabelled tiles, %",
        f"{HOSTILE}, share 1/8: IoU of s1 there, %",
        f"{HOSTILE}, share 1/8: dying classes",
    ]
    assert curves[0].lines[0].points[-1] == pytest.approx((2.0, 30.0, 0.0))
    extras = Extras(curves, [(f"a {HOSTILE}", b"png")], [f"no tiles of {HOSTILE}"])
    text = page([table], [extras], f"dctc compare {HOSTILE}")
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("script") == 1, "the page's own"
    assert HOSTILE in reader.text
    assert {"table", "svg", "polyline", "details", "img"} <= set(reader.tags)
    assert ("name", "viewport") in reader.attributes
    links = [value for name, value in reader.attributes if name in ("src", "href", "action") and value]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "://" not in text
    assert "url(" not in text
    assert "60.0 (1)" in reader.text
    assert ("data-sort", "0.6") in reader.attributes


def test_figure_6_as_files(store: Store, tmp_path: Path) -> None:
    for share, score in (("10%", 0.5), ("50%", 0.6), ("100%", 0.65)):
        store.add("dctc", share, 0, s1=score)
        store.add("dctc", share, 1, s1=score + 0.02)
    store.add("supervised", "1", 0, tags={"network": "unet"}, s1=0.55)
    store.add("supervised", "1", 0, tags={"network": "u2net"}, s1=0.7)
    store.add("unimatch", "50%", 0, s1=0.58)
    tables = compare(store.uri, store.name, beside="gid")
    assert [(line.name, line.dashed, line.printed, list(line.points)) for line in figure6(tables[0])] == [
        ("dctc, unet", False, False, [(10.0, 51.0, APART), (50.0, 61.0, APART), (100.0, 66.0, APART)]),
        ("dctc, unet, paper", False, True, [(50.0, 81.8, 0.0), (100.0, 82.1, 0.0)]),
        ("supervised, unet, all labels", True, False, [(100.0, pytest.approx(55.0), 0.0)]),
        ("supervised, unet, all labels, paper", True, True, [(100.0, 79.8, 0.0)]),
        ("unimatch, unet", False, False, [(50.0, pytest.approx(58.0), 0.0)]),
    ]
    for name in ("figure.png", "figure.svg"):
        write_figure6(tables, tmp_path / name)
    before = (tmp_path / "figure.svg").read_bytes()
    write_figure6(tables, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == before
    with pytest.raises(InputError, match=r"a figure is a \.png or a \.svg file"):
        write_figure6(tables, tmp_path / "figure.jpg")
    with Image.open(tmp_path / "figure.png") as one:
        size = one.size
    for share in ("1/4", "1/2"):
        store.add("dctc", share, 0, digest="d2", s1=0.3)
    write_figure6(compare(store.uri, store.name), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as two:
        assert two.size == (2 * size[0], size[1]), "a chart for each dataset"


APART = pytest.approx(100 * statistics.stdev((0.0, 0.02)))


# ---- pictures, and all of it as typed


def add_tiles(store: Store, run: str, folder: Path, shift: int = 0, **nets: int) -> None:
    """The artifact of a run: two tiles of 16 px, and nets that each say one class everywhere."""
    image = (np.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) + shift).astype(np.uint8)
    colors = np.array([(255, 0, 0), (0, 0, 255)], np.uint8)
    maps = {f"net/{net}": np.full((2, 16, 16), label, np.uint8) for net, label in nets.items()}
    np.savez(
        folder / "tiles.npz", allow_pickle=False, image=image, label=np.zeros((2, 16, 16), np.uint8),
        valid=np.ones((2, 16, 16), bool), limits=np.array([(0.0, 255.0)] * 3), classes=np.array(["road", "<b>"]),
        colors=colors, **maps,
    )  # fmt: skip
    store.client.log_artifact(run, str(folder / "tiles.npz"))


def shares_of_colors(data: bytes) -> dict[tuple[int, ...], float]:
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {color: float((pixels == color).all(1).mean()) for color in ((255, 0, 0), (0, 0, 255))}


def test_predictions_of_headlines_on_the_same_tiles(store: Store, tmp_path: Path) -> None:
    for share in ("1/4", "1/2"):
        add_tiles(store, store.add("dctc", share, 0, s1=0.5), tmp_path, s1=1, teacher=0)
        run = store.add("mean_teacher", share, 0, tags={"headline": "ema"}, s1=0.5, ema=0.4)
        add_tiles(store, run, tmp_path, s1=0, ema=1)
    store.add("cps", "1/4", 0, s1=0.5)
    add_tiles(store, store.add("cps", "1/2", 0, s1=0.5), tmp_path, shift=9, s1=1)
    (table,) = compare(store.uri, store.name)
    found = panels(store.uri, table)
    assert [caption for caption, _ in found.pictures] == ["dctc", "mean_teacher", "share 1/4", "share 1/2"]
    for _, data in found.pictures:
        shares = shares_of_colors(data)
        assert shares[0, 0, 255] > 1.9 * shares[255, 0, 0] > 0.2, "the label is red, both predictions are blue"
    assert [note.split(":")[0] for note in found.notes] == [
        "no predictions to show of 1 run(s) whose tiles.npz is not in MLflow, or cannot be read",
        "no predictions to show of 1 run(s) on other tiles than the first",
    ]


def type_command(store: Store, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["compare", store.name, "--uri", store.uri, *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_everything_as_typed(store: Store, tmp_path: Path) -> None:
    for share, score in (("1/4", 0.5), ("1/2", 0.6)):
        iou = {"test/s1/iou/car": [score], "test/s1/iou/tree": [0.3]}
        add_tiles(store, store.add("dctc", share, 0, metrics=iou, s1=score), tmp_path, s1=1)
        store.add("cps", share, 0, metrics=iou, s1=0.2)
    files = {option: tmp_path / f"out.{option}" for option in ("csv", "markdown")}
    files |= {"out": tmp_path / "out.html", "figure": tmp_path / "out.svg"}
    told = type_command(store, *(text for option, path in files.items() for text in (f"--{option}", str(path))))
    assert "60.0 (1)" in told
    assert all(path.stat().st_size > 100 for path in files.values())
    reader = Reader()
    reader.feed(files["out"].read_text())
    assert reader.tags.count("table") == 5, "methods, the classes side by side for both shares, and of both methods"
    assert "no predictions to show of 2 run(s) whose tiles.npz is not in MLflow, or cannot be read" in reader.text
    assert ("src", "data:image/png;base64,") in [(name, (value or "")[:22]) for name, value in reader.attributes]

    classes = type_command(store, "--table", "2", "--of", "cps", "--paper", "potsdam")
    assert "car" in classes
    assert "dctc" not in classes
    beside = type_command(store, "--cols", "class")
    assert all(text in beside for text in ("share 1/4: test IoU", "share 1/2: test IoU", "cps", "dctc", "30.0 (1)"))
    for arguments, message in (
        (["--paper", "berlin"], "--paper berlin: the paper has potsdam, vaihingen, gid"),
        (["--of", "cps"], "--of cps: is for --table 2"),
        (["--table", "2", "--metric", "f1"], "--metric f1: --table 2 has the IoU of each class"),
        (["--cols", "class", "--metric", "f1"], "--metric f1: --cols class has the IoU of each class"),
        (["--cols", "class", "--table", "2"], "--cols class: --table 2 has classes as rows"),
        (["--out", str(tmp_path / "nowhere" / "a.html")], "there is no folder"),
        (["--csv", str(tmp_path)], "is a folder; name a file"),
    ):
        with pytest.raises(InputError, match=message):
            type_command(store, *arguments)


DOCS = (Path(__file__).resolve().parents[2] / "docs" / "comparing.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^ +dctc compare (.*)$", DOCS, re.MULTILINE))
def test_the_commands_of_the_page(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.split()
    tags = {"sweep": words[words.index("--sweep") + 1], "row": "Ours"}
    for share in ("1/4", "1/2"):
        store.add("dctc", share, 0, tags=tags, metrics={"test/s1/iou/car": [0.4]}, s1=0.5)
    assert "(1)" in type_command(store, *words[1:])
    written = {word for word in words if word.startswith(tags["sweep"] + ".") or word.endswith(".png")}
    assert written <= {path.name for path in tmp_path.iterdir()}


def test_markdown(store: Store) -> None:
    store.add("a|b", "1/2", 0, s1=0.5)
    store.add("dctc", "1/2", 0, s1=0.6, teacher=0.9)
    lines = markdown(compare(store.uri, store.name)).splitlines()
    assert "| a\\|b | s1 | 50.0 (1) |" in lines
    assert "| dctc | s1 | **60.0 (1)** |" in lines
    assert "| dctc | teacher | 90.0 (1) |" in lines
