"""A run's configuration: what wins, what is refused and in which words, and that every shipped file loads."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from dctc.config import COMMAND_LINE, Config, load_config, nearest, parse_override
from dctc.engine.build import completed, resolve
from dctc.methods import OptionError, method_names, parse_options
from dctc.networks import network_names
from shards.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "data")
SWEEPS = [path for path in FILES if "\nrows:\n" in path.read_text()]
SHIPPED = [path for path in FILES if path not in SWEEPS]
METHODS = {
    "dctc", "unet", "attention_unet", "u2net", "mean_teacher", "cps", "cps_cutmix", "dst_cbc", "unimatch",
    "dctc_extended",
}  # fmt: skip
TABLES = {"table1", "table2", "table3", "figure6", "extended", "ablation"}
LEAST = "data: {dataset: datasets/x}\nmethod: {name: dctc}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "Traceback" not in message
    assert "pydantic" not in message
    return message


# ---- what wins


def test_the_defaults_are_the_papers(folder: Path) -> None:
    config = load_config(write(folder, LEAST))
    assert config.data.labelled_share == 1
    assert (config.data.batch_labelled, config.data.batch_unlabelled, config.data.augment) == (4, 4, "none")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.betas) == ("adam", 1e-3, (0.9, 0.999))
    assert (config.optimizer.eps, config.optimizer.weight_decay, config.optimizer.clip) == (1e-8, 0.0, None)
    assert (config.schedule.epochs, config.schedule.warmup, config.schedule.rounds) == (100, 5, None)
    assert (config.network.name, config.network.width, config.run.seed) == ("unet", 64, 0)
    options = parse_options("dctc", config.method.options)
    assert (options.temperature, options.sharpen, options.attention, options.loss) == (0.5, "both", True, "multiclass")
    assert (options.pseudo_label, options.update) == ("hard", "in_turn")
    assert (options.phase2_start, options.phase2_ramp, options.phase3_start, options.phase3_ramp) == (0, 0, 0, 0)


def test_later_files_the_file_itself_and_overrides_win_in_this_order(folder: Path) -> None:
    write(folder, "optimizer: {lr: 0.1, eps: 0.1, momentum: 0.1}\nnetwork: {width: 1}\nrun: {seed: 1}\n", "base/a.yaml")
    write(folder, "extends: a.yaml\noptimizer: {lr: 0.2, eps: 0.2}\nnetwork: {width: 2}\n", "base/b.yaml")
    write(folder, "network: {width: 3}\n", "c.yaml")
    path = write(folder, LEAST + "extends: [base/b.yaml, c.yaml]\noptimizer: {lr: 0.3}\n")
    config = load_config(path)
    assert config.run.seed == 1  # from the bottom of the chain, relative to the file that extends it
    assert config.optimizer.momentum == 0.1
    assert config.optimizer.eps == 0.2  # b over a
    assert config.network.width == 3  # c, named later, over b
    assert config.optimizer.lr == 0.3  # the file itself over all it extends
    config = load_config(path, ["optimizer.lr=0.4", "network.width=4", "optimizer.lr=0.5"])
    assert (config.optimizer.lr, config.network.width) == (0.5, 4)  # the command line, its last word


def test_method_options_merge_by_key(folder: Path) -> None:
    write(folder, "method: {name: dctc, temperature: 0.25, sharpen: s1}\n", "base.yaml")
    path = write(folder, "extends: base.yaml\ndata: {dataset: x}\nmethod: {sharpen: s2}\n")
    assert load_config(path, ["method.attention=false"]).method.options == {
        "temperature": 0.25, "sharpen": "s2", "attention": False,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.1e-2", "+1e-3", ".001", "0.001"])
def test_numbers_as_people_write_them(folder: Path, text: str) -> None:
    assert load_config(write(folder, LEAST + f"optimizer: {{lr: {text}}}\n")).optimizer.lr == pytest.approx(1e-3)
    assert load_config(write(folder, LEAST), [f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1", 1),
        ("a.b=1/8", "1/8"),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b=x=y", "x=y"),
        ("a.b=", None),
        ("a.b=x #2", "x #2"),
        ("a.b=#2", "#2"),
        ("a.b='x' #2", "x"),
        ('a.b="x #2"', "x #2"),
        ("a.b=3 # three", 3),
        (" a.b =true", True),
    ],
)
def test_an_override_is_a_dotted_key_and_a_yaml_value(text: str, value: Any) -> None:
    assert parse_override(text) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("text", "share"), [("1/8", (1, 8)), ("0.125", (1, 8)), ("12.5%", (1, 8)), ("1", (1, 1)), ("0.1", (1, 10))]
)
def test_shares_are_exact(folder: Path, text: str, share: tuple[int, int]) -> None:
    config = load_config(write(folder, LEAST), [f"data.labelled_share={text}"])
    assert config.data.labelled_share == Fraction(*share)
    assert config.plain()["data"]["labelled_share"] == str(Fraction(*share))


def test_the_resolved_configuration_loads_again(folder: Path) -> None:
    overrides = [
        "data.labelled_share=1/3",
        "optimizer.lr=3e-4",
        "method.sharpen=none",
        "optimizer.clip=1",
        "run.name=a b",
    ]
    config = load_config(write(folder, LEAST), overrides)
    again = load_config(write(folder, yaml.safe_dump(config.plain(), sort_keys=False), "resolved.yaml"))
    assert again == config
    assert again.flat()["data.labelled_share"] == "1/3"
    assert again.flat()["method.sharpen"] == "none"


# ---- what is refused


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", ("unknown key optimizer.lrr", "did you mean 'lr'")),
        ("optimiser.lr=1", ("unknown key optimiser", "did you mean 'optimizer'")),
        ("data.labeled_share=1/4", ("unknown key data.labeled_share", "did you mean 'labelled_share'")),
        ("run.xyzzy=1", ("unknown key run.xyzzy", "valid are", "checkpoint_every", "seed")),
        ("schedule.rounds=many", ("schedule.rounds", "'many'", "integer")),
        ("schedule.rounds=1.5", ("schedule.rounds", "1.5", "integer")),
        ("schedule.rounds=0", ("schedule.rounds", "greater than or equal to 1")),
        ("optimizer.lr=fast", ("optimizer.lr", "'fast'", "number")),
        ("optimizer.lr=0", ("optimizer.lr", "greater than 0")),
        ("optimizer.lr=.nan", ("optimizer.lr", "nan")),
        ("optimizer.name=adagrad", ("optimizer.name", "'adagrad'", "'adam'")),
        ("optimizer.betas=[0.9]", ("optimizer.betas",)),
        ("precision.dtype=fp64", ("precision.dtype", "'fp64'", "'bf16'")),
        ("precision.dtype=fp8", ("precision.dtype", "'fp8'", "nn.Linear alone", "use bf16")),
        ("run.profile=3..x", ("run.profile", "'3..x'")),
        ("parallel.accumulation=0", ("parallel.accumulation", "0")),
        ("data=3", ("key data is 3",)),
        ("method=dctc", ("key method is 'dctc'",)),
        ("data.labelled_share=0", ("data.labelled_share", "outside (0, 1]")),
        ("data.labelled_share=-1/8", ("data.labelled_share", "outside (0, 1]")),
        ("data.labelled_share=1.5", ("data.labelled_share", "1.5", "outside (0, 1]")),
        ("data.labelled_share=some", ("data.labelled_share", "'some'", "1/8")),
        ("data.labelled_share=1/0", ("data.labelled_share", "1/0")),
        ("data.labelled_share=", ("data.labelled_share",)),
        ("data.labelled_share=nan", ("data.labelled_share", "nan")),
        ("run.seed=-1", ("run.seed", "-1")),
    ],
)
def test_bad_values_are_named_with_their_key_and_place(folder: Path, override: str, words: tuple[str, ...]) -> None:
    path = write(folder, LEAST)
    message = refused(path, override)
    assert COMMAND_LINE in message
    assert [word for word in words if word not in message] == []
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    if name:  # the same in a file names the file
        nested = {"data": {"dataset": "x"}, "method": {"name": "dctc"}}
        nested[section] = {**nested.get(section, {}), name: yaml.safe_load(value)}
        message = refused(write(folder, yaml.safe_dump(nested), "other.yaml"))
        assert "other.yaml" in message
        assert section in message


def test_an_error_names_the_file_that_brought_it(folder: Path) -> None:
    base = write(folder, "optimizer: {lr: fast}\nrun: {sede: 1}\n", "base.yaml")
    path = write(folder, LEAST + "extends: base.yaml\nnetwork: {widht: 3}\n")
    message = refused(path, "schedule.epochs=x")
    assert f"{base}: key optimizer.lr" in message
    assert f"{base}: unknown key run.sede; did you mean 'seed'?" in message
    assert f"{path}: unknown key network.widht; did you mean 'width'?" in message
    assert f"{COMMAND_LINE}: key schedule.epochs" in message


def test_a_missing_dataset_or_method_is_named(folder: Path) -> None:
    path = write(folder, "data: {workers: 1}\nmethod: {name: dctc}\n")
    assert "data.dataset is missing" in refused(path)
    assert "run.yaml" in refused(path)
    assert "method is missing" in refused(write(folder, "data: {dataset: x}\n"))
    assert "method.name is missing" in refused(write(folder, "data: {dataset: x}\nmethod: {sharpen: s1}\n"))


@pytest.mark.parametrize("text", ["novalue", "=3", " =3", "optimizer.lr=[", "a: b"])
def test_a_malformed_override_is_refused(folder: Path, text: str) -> None:
    assert text.strip() in refused(write(folder, LEAST), text)


@pytest.mark.parametrize("text", ["", "- a\n", "3\n", "a: [\n", "!!python/object/apply:os.getcwd []\n", "\x00"])
def test_a_file_that_is_no_configuration_is_named(folder: Path, text: str) -> None:
    assert "run.yaml" in refused(write(folder, text))


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    assert "nothing.yaml" in refused(folder / "nothing.yaml")
    assert str(folder) in refused(folder)
    (folder / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    assert "latin.yaml" in refused(folder / "latin.yaml")
    assert "gone.yaml" in refused(write(folder, LEAST + "extends: gone.yaml\n"))


def test_a_file_that_extends_itself_is_refused(folder: Path) -> None:
    assert "extends itself" in refused(write(folder, LEAST + "extends: run.yaml\n"))
    write(folder, "extends: sub/b.yaml\n", "a.yaml")
    write(folder, "extends: ../a.yaml\n", "sub/b.yaml")
    message = refused(write(folder, LEAST + "extends: a.yaml\n"))
    assert "extends itself" in message
    assert "b.yaml" in message


def test_a_run_is_called_after_its_file_unless_the_command_line_says_otherwise(folder: Path) -> None:
    write(folder, "data: {dataset: d, labelled_share: 1/8}\nmethod: {name: dctc}\n", "dctc.yaml")
    extended = write(folder, "extends: dctc.yaml\nmethod: {ensemble: true}\n", "dctc_extended.yaml")

    def name(*overrides: str) -> str | None:
        return load_config(extended, overrides).run.name

    assert name() == "dctc_extended-1/8-s0"
    assert name("data.labelled_share=0.25", "run.seed=2", "network.width=4") == "dctc_extended-1/4-s2"
    assert name("method.name=cps", "method.ensemble=null") == "cps-1/8-s0"
    assert name("run.name=mine") == "mine"
    assert name("run.name=null") == "dctc_extended-1/8-s0"
    written = write(folder, yaml.safe_dump(load_config(extended).plain()), "config.yaml")
    assert load_config(written).run.name == "dctc_extended-1/8-s0", "a run's own copy of its settings is that run"


def test_no_two_shipped_files_of_a_dataset_are_one_run() -> None:
    """The README has one after the other: the second was taken for the first with other settings, and refused."""
    runs = Counter(
        (load_config(p).data.dataset, load_config(p).run.experiment, load_config(p).run.name) for p in SHIPPED
    )
    assert [run for run, times in runs.items() if times > 1] == []


def test_a_diamond_is_no_circle(folder: Path) -> None:
    write(folder, "run: {seed: 3}\n", "top.yaml")
    for side in ("left", "right"):
        write(folder, "extends: top.yaml\n", f"{side}.yaml")
    assert load_config(write(folder, LEAST + "extends: [left.yaml, right.yaml]\n")).run.seed == 3


@pytest.mark.parametrize("value", ["null", "3", "true", "{a: b}", "[3]", "[[a.yaml]]"])
def test_extends_that_names_no_files_is_refused(folder: Path, value: str) -> None:
    assert "run.yaml" in refused(write(folder, LEAST + f"extends: {value}\n"))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["optimizer.betas=[2, 3]"], id="betas above 1"),
        pytest.param(["optimizer.lr=.inf"], id="infinite rate"),
        pytest.param(["schedule.epochs=3", "schedule.warmup_epochs=5"], id="a warm-up longer than the run"),
    ],
)
def test_impossible_settings_are_refused(folder: Path, overrides: list[str]) -> None:
    assert overrides[-1].partition("=")[0].split(".")[1] in refused(write(folder, LEAST), *overrides)


def test_nearest() -> None:
    assert nearest("whidth", ["width", "name"]) == "did you mean 'width'?"
    assert nearest("zzz", ["width", "name"]) == "valid are name, width"


# ---- what decides a result

FREE = {
    "data.dataset": "elsewhere", "data.workers": 3, "data.prefetch": 4, "data.cache": "c", "data.cache_bytes": "1GB",
    "data.on_damage": "substitute", "run.output": "out", "run.experiment": "e", "run.name": "n",
    "run.checkpoint_every": 7, "run.keep": 5, "run.resume": "never", "run.pictures_every": 9, "run.log_every": 3,
    "tracking.enabled": False, "tracking.uri": "http://x", "evaluation.every": 4, "evaluation.batch": 2,
    "evaluation.pictures": 1, "evaluation.test": False, "run.profile": "2..3", "optimizer.nonfinite": "skip",
    "tracking.register_as": "towns",
}  # fmt: skip
DECIDING = {
    "data.labelled_share": "1/4", "data.batch_labelled": 8, "data.batch_unlabelled": 8, "data.augment": "flips",
    "data.photometry": 0.5, "data.cutmix": True, "data.order": "block", "data.mix": 8,
    "network.name": "other", "network.width": 8, "network.backbone": "resnet18", "network.weights": "w.pth",
    "network.norm": "group",
    "method.name": "supervised",
    "method.sharpen": "none", "optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.betas": [0.5, 0.5],
    "optimizer.eps": 0.1, "optimizer.momentum": 0.5, "optimizer.weight_decay": 0.1, "optimizer.clip": 1.0,
    "schedule.epochs": 50, "schedule.rounds": 70, "schedule.warmup_epochs": 1,
    "schedule.shape": "poly", "precision.dtype": "bf16",
    "precision.channels_last": True, "run.seed": 1,
}  # fmt: skip
LAYOUT = {
    "parallel.strategy": "none", "parallel.accumulation": 2, "parallel.activation_checkpointing": True,
    "parallel.compile": "default", "parallel.offload": True, "parallel.timeout": 60,
}  # fmt: skip  # may change between two sittings of one run


def changed(folder: Path, key: str, value: Any) -> set[str]:
    path = write(folder, LEAST)
    before = load_config(path).result_settings()
    after = load_config(path, [f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip()}"])
    settings = after.result_settings()
    return {k for k in {*before, *settings} if before.get(k) != settings.get(k)}


@pytest.mark.parametrize("key", FREE)
def test_settings_that_leave_the_weights_alone(folder: Path, key: str) -> None:
    assert changed(folder, key, FREE[key]) == set()


@pytest.mark.parametrize("key", DECIDING)
def test_settings_that_decide_the_weights(folder: Path, key: str) -> None:
    assert changed(folder, key, DECIDING[key]) == {key}


def test_every_key_is_in_one_of_the_two_lists(folder: Path) -> None:
    flat = load_config(write(folder, LEAST), ["method.sharpen=both"]).flat()
    assert {*FREE, *DECIDING, *LAYOUT} == set(flat)


def test_one_share_in_three_spellings_is_one_setting(folder: Path) -> None:
    path = write(folder, LEAST)
    settings = [load_config(path, [f"data.labelled_share={s}"]).result_settings() for s in ("1/8", "0.125", "12.5%")]
    assert settings[0] == settings[1] == settings[2]


def test_tags_are_strings_of_any_name_and_leave_the_weights_alone(folder: Path) -> None:
    path = write(folder, LEAST)
    tagged = load_config(path, ["tracking.tags={sweep: table1, mlflow.parentRunId: abc}"])
    assert tagged.tracking.tags == {"sweep": "table1", "mlflow.parentRunId": "abc"}
    assert tagged.result_settings() == load_config(path).result_settings()
    with pytest.raises(InputError, match=r"key tracking\.tags\.sweep is \['a'\]"):
        load_config(path, ["tracking.tags={sweep: [a]}"])


@pytest.mark.parametrize("key", sorted({*DECIDING} - {"method.name"}))
def test_a_run_from_before_a_key_goes_on_with_its_default_alone(folder: Path, key: str) -> None:
    path = write(folder, LEAST)
    config = resolve(load_config(path))
    before = {k: v for k, v in config.result_settings().items() if k != key}
    assert completed(config, before) == config.result_settings()
    value = yaml.safe_dump(DECIDING[key], default_flow_style=True).removesuffix("...").strip()
    other = resolve(load_config(path, [f"{key}={value}"]))
    assert completed(other, before) != other.result_settings()
    assert completed(config, {**before, "gone": 1})["gone"] == 1, "a key that is no more is still a difference"


@pytest.mark.parametrize("method", method_names())
def test_a_run_from_before_an_option_of_its_method_goes_on(folder: Path, method: str) -> None:
    config = resolve(load_config(write(folder, LEAST), [f"method={{name: {method}}}"]))
    now = config.result_settings()
    options = [key for key in now if key.startswith("method.") and key != "method.name"]
    assert options
    for key in options:
        assert completed(config, {k: v for k, v in now.items() if k != key}) == now


# ---- what is shipped


def test_something_is_shipped() -> None:
    """Every method and table for every dataset."""
    datasets = {"potsdam", "vaihingen", "gid5", "gid15", "loveda", "dubai", "synthetic"}
    for dataset in datasets:
        assert {path.stem for path in SHIPPED if path.parent.name == dataset} >= METHODS
        assert {path.stem for path in SWEEPS if path.parent.name == dataset} >= TABLES
    assert {path.parent.name for path in SHIPPED} >= datasets


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_sweeps_name_configurations_options_and_themselves(path: Path) -> None:
    """What needs no dataset; ``dctc sweep`` checks the rest before it starts."""
    sweep = yaml.safe_load(path.read_text())
    for row in sweep["rows"]:
        settings = {**sweep.get("set", {}), **row.get("set", {})}
        config = load_config(path.parent / row["config"], [f"{key}={value}" for key, value in settings.items()])
        parse_options(config.method.name, config.method.options)
    assert f"dctc sweep {path.relative_to(ROOT)}\n" in path.read_text()
    assert f"dctc compare --sweep {sweep['name']} " in path.read_text()
    assert "score" in path.read_text()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_two_rows_of_a_shipped_sweep_are_one_run(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    rows: dict[str, str] = {}
    for row in sweep["rows"]:
        settings = {**sweep.get("set", {}), **row.get("set", {})}
        config = load_config(path.parent / row["config"], [f"{key}={value}" for key, value in settings.items()])
        trained = json.dumps([resolve(config).result_settings(), row.get("times"), row.get("shares")], sort_keys=True)
        assert trained not in rows, f"{row['row']} is {rows.get(trained)}"
        rows[trained] = row["row"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_load(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, Config)
    assert config.network.name in network_names()
    parse_options(config.method.name, config.method.options)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_header_says_the_command_the_cost_and_the_score(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    assert path.relative_to(ROOT).as_posix() in header[0]
    assert "score" in header[0].lower()


# ---- a method's options


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"sharpn": "s1"}, "sharpn", "no option 'sharpn'"),
        ({"sharpen": "s3"}, "sharpen", "none, s1, s2, both"),
        ({"sharpen": None}, "sharpen", "none, s1, s2, both"),
        ({"loss": ["binary"]}, "loss", "multiclass, binary"),
        ({"temperature": "warm"}, "temperature", "expected float"),
        ({"temperature": True}, "temperature", "expected float"),
        ({"attention": 1}, "attention", "expected bool"),
        ({"attention": "yes"}, "attention", "expected bool"),
        ({"phase2_start": "1"}, "phase2_start", "expected float"),
        ({"phase3_ramp": True}, "phase3_ramp", "expected float"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        parse_options("dctc", options)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0),
        ("temperature", 1.5),
        ("temperature", float("nan")),
        ("phase2_start", -1),
        ("phase3_ramp", -1),
    ],
)
def test_an_option_out_of_range_is_named(key: str, value: float) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options("dctc", {key: value})
    assert caught.value.key == key  # what the user reads is "key method.KEY: ..."


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'dctcc'") as caught:
        parse_options("dctcc", {})
    assert caught.value.key == "name"
    assert caught.value.known == method_names()
    assert {"dctc", "supervised"} <= set(method_names())
    assert not {"base", "losses"} & set(method_names())


def test_whole_numbers_are_taken_for_floats() -> None:
    options = parse_options("dctc", {"temperature": 1})
    assert type(options.temperature) is float
    with pytest.raises(OptionError, match="no option 'temperature'"):
        parse_options("supervised", {"temperature": 1})
