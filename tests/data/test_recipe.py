from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from shards.errors import InputError
from shards.inputs import Ids, Mask, Unlabelled, Vector
from shards.recipe import Recipe, load_recipe
from shards.sections import Section
from tests.data.layouts import RECIPES


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_say_their_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    text = path.read_text()
    assert "dctc shard" in text.split("\nname:")[0]
    assert recipe.splits.protocol == "scene"
    assert load_recipe(path, ["splits.protocol=paper"]).splits.paper.test_share == 0.1


def test_official_lists_are_complete() -> None:
    potsdam = load_recipe(RECIPES / "potsdam.yaml").splits.scene
    assert len(set(potsdam.test)) == 14
    assert len(set(potsdam.train)) == 24
    assert not set(potsdam.test) & set(potsdam.train)
    vaihingen = load_recipe(RECIPES / "vaihingen.yaml").splits.scene
    assert len(set(vaihingen.test)) == 17
    assert len(set(vaihingen.train)) == 16
    assert not set(vaihingen.test) & set(vaihingen.train)


def test_template_shows_every_key_and_its_default() -> None:
    path = RECIPES / "own_scenes.yaml"
    written = yaml.safe_load(path.read_text())
    bare = {key: written[key] for key in ("name", "image", "classes")} | {
        "label": {key: written["label"][key] for key in ("pattern", "ignore_colors")},
        "bands": {"names": written["bands"]["names"]},
        "splits": {"protocol": written["splits"]["protocol"]},
    }
    full = load_recipe(path).model_dump(mode="json")
    assert full == Recipe.model_validate(bare).model_dump(mode="json")
    assert full.keys() == written.keys()
    for key, section in full.items():
        if isinstance(section, dict):
            assert section.keys() == written[key].keys()


@pytest.mark.parametrize(("section", "model"), [("label", Ids), ("label", Vector), ("mask", Mask)])
def test_template_explains_the_sections_that_it_leaves_out(section: str, model: type[Section]) -> None:
    """Each stands there as a comment that holds every key and is a recipe once its "# " is removed."""
    lines = (RECIPES / "own_scenes.yaml").read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if line == f"# {section}:"]
    found = []
    for start in starts:
        block = [line[2:] for line in itertools.takewhile(lambda text: text.startswith("# "), lines[start:])]
        end = next((n for n, line in enumerate(block[1:], 1) if not line.startswith(" ")), len(block))
        found.append(yaml.safe_load("\n".join(block[:end]))[section])
    (shown,) = [one for one in found if one.get("kind") in (None, *get_args(_kind(model)))]
    assert shown.keys() == model.model_fields.keys()
    template = yaml.safe_load((RECIPES / "own_scenes.yaml").read_text())
    assert isinstance(getattr(Recipe.model_validate(template | {section: shown}), section), model)


def _kind(model: type[Section]) -> Any:
    return model.model_fields["kind"].annotation if "kind" in model.model_fields else None


def test_template_explains_extra_imagery() -> None:
    lines = (RECIPES / "own_scenes.yaml").read_text().splitlines()
    start = lines.index("# unlabelled:")
    block = [line[2:] for line in itertools.takewhile(lambda text: text.startswith("# "), lines[start:])]
    (shown,) = yaml.safe_load("\n".join(block))["unlabelled"]
    assert shown.keys() == Unlabelled.model_fields.keys()


def test_overrides_win_and_keep_their_types() -> None:
    recipe = load_recipe(
        RECIPES / "potsdam.yaml",
        ["tile.size=256", "splits.scene.val=['7_*']", "classes.5.name=rest", "labelled.shares=[1/3, 1]", "name=p2"],
    )
    assert recipe.tile.size == 256
    assert recipe.splits.scene.val == ["7_*"]
    assert recipe.classes[5].name == "rest"
    assert recipe.labelled.shares == ["1/3", "1"]
    assert recipe.digest != load_recipe(RECIPES / "potsdam.yaml").digest


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tile.sise=64", "unknown key tile.sise; did you mean 'size'"),
        ("splitz.protocol=paper", "unknown key splitz; did you mean 'splits'"),
        ("label.zzz=1", "unknown key label.zzz; known here: pattern, kind"),
        ("splits.scene.tets=[a]", "unknown key splits.scene.tets; did you mean 'test'"),
        ("label.kind=id", "key label.kind: 'id' is not known; it can be 'palette', 'ids', 'vector'"),
        ("label={kind: ids, pattern: '(?P<a>.)', map: {0: lawn}}", "label names the class 'lawn', which classes"),
        ("label={kind: ids, pattern: '(?P<a>.)', map: {low: tree}}", "key label.map.low: input should be a valid int"),
        ("label={kind: ids, pattern: '(?P<a>.)', resampling: cubic}", "key label.resampling: 'cubic' is not known"),
        ("label={kind: ids, pattern: '(?P<a>.)', layer: x}", "unknown key label.layer; did you mean"),
        ("label={kind: vector, pattern: x, map: {a: tree}}", "map needs attribute"),
        ("label={kind: vector, pattern: x}", "label.attribute is null, so every feature is of the one class"),
        ("label={kind: vector, pattern: x, attribute: a, background: lawn}", "label names the class 'lawn'"),
        ("label={kind: vector, pattern: x, attribute: a, background: ignore}", "label.background: leave it out"),
        ("label={kind: vector, pattern: [x, '(?P<a>.)'], attribute: a}", "either each has a named group"),
        ("label.pattern=x", "'x' has no named group"),
        ("image.files=[1]", "files and the named group 'band' go together"),
        ("image.pattern=(?P<a>.)_(?P<band>.)", "files and the named group 'band' go together"),
        ("image={pattern: '(?P<band>.)', files: [1]}", "has no named group such as (?P<scene>...)"),
        ("image={pattern: '(?P<a>.)(?P<band>.)', files: [1, 1]}", "files names a file twice"),
        ("image.resampling=nearest", "resampling is for stacks"),
        ("mask={pattern: '(?P<a>.)', ignore: ones}", "key mask.ignore: 'ones' is not known"),
        ("unlabelled=[{folder: x, pattern: '(?P<a>.)(?P<band>.)'}]", "the named group 'band' is for stacks"),
        ("unlabelled=[{folder: x}]", "key unlabelled.0.pattern: is missing"),
        (
            "splits.protocol=blok",
            "key splits.protocol: 'blok' is not known; it can be 'paper', 'scene', 'block' or 'files'",
        ),
        ("splits.protocol=files", "protocol files needs at least one of splits.files.train, .val and .test"),
        ("codec.image=jpg", "key codec.image: 'jpg' is not known"),
        ("tile.size=big", "key tile.size: "),
        ("tile.stride=600", "stride 600 is larger than size 512"),
        ("labelled.shares=[0]", "labelled share 0 is outside (0, 1]"),
        ("labelled.shares=[half]", "labelled share 'half' is not a number"),
        ("image.pattern=a[", "not a regular expression"),
        ("image.pattern=a.tif", "has no named group"),
        ("classes=[]", "classes is empty"),
        ("classes.1.color=[255,255,255]", "a colour stands twice"),
        ("classes.1.color=[1,2,300]", "key classes.1.color.2"),
        ("classes.1.color=[1,2,3]", "label.threshold needs a palette"),
        ("classes.1.name=tree", "two classes have the same name"),
        ("bands.keep=[1,2]", "keep has 2 bands"),
        ("splits.paper.test_share=0.7", None),
        ("splits.paper={test_share: 0.7, val_share: 0.4}", "leave nothing to train on"),
        ("tile", "not of the form key=value"),
        ("name.x=1", "has no keys"),
        ("classes.9.name=x", "no place in a list of 6"),
    ],
)
def test_wrong_values_are_named(override: str, said: str | None) -> None:
    if said is None:
        load_recipe(RECIPES / "potsdam.yaml", [override])
        return
    with pytest.raises(InputError) as caught:
        load_recipe(RECIPES / "potsdam.yaml", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_class_may_be_called_ignore_where_a_map_says_ignore() -> None:
    label = "label={kind: ids, pattern: '(?P<a>.)', map: {0: tree, 1: ignore}}"
    assert load_recipe(RECIPES / "potsdam.yaml", [label]).label is not None
    with pytest.raises(InputError, match=r"a class is named 'ignore', which in label\.map means no class"):
        load_recipe(RECIPES / "potsdam.yaml", [label, "classes.0.name=ignore"])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_recipe(bad)
    bad.write_text("- 1")
    with pytest.raises(InputError, match="no mapping"):
        load_recipe(bad)
    bad.write_text("name: x")
    with pytest.raises(InputError, match="key image: is missing"):
        load_recipe(bad)
