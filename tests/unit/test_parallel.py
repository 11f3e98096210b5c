"""What a launcher asks for, what came up, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dctc.config import Config
from dctc.engine import zero
from dctc.engine.build import must_go_together, settle
from dctc.engine.parallel import Launch, Parallel
from shards.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"data": {"dataset": "d"}, "method": {"name": "dctc"}, **sections})


# ---- the launcher's variables


def test_a_launcher_that_names_no_strategy() -> None:
    assert Launch.read({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "false"}).strategy is None


def test_fsdp2() -> None:
    assert Launch.read({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).strategy == "fsdp2"
    with pytest.raises(InputError, match="fsdp_version: 2"):
        Launch.read({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_by_a_file_and_by_a_number(stage: int) -> None:
    file = ROOT / "launch" / f"zero{stage}.json"
    launch = Launch.read({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert (launch.strategy, launch.source) == (f"zero{stage}", str(file))
    other = Launch.read({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
    assert other.strategy == launch.strategy
    assert other.zero == launch.zero, "torchrun with parallel.strategy, and the file, mean the same"


def test_zero_0_is_ddp() -> None:
    with pytest.raises(InputError, match="stage 0"):
        Launch.read({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is for the run's config to say, as optimizer.clip"),
        ({"bf16": {"enabled": True}}, "bf16 is for the run's config to say, as precision.dtype"),
        ({"train_batch_size": 8}, "data.batch_labelled"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must be 1"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0"),
        ({"zero_optimization": None}, "not a DeepSpeed configuration"),
    ],
)
def test_a_deepspeed_file_says_only_what_is_its_to_say(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(zero.default_settings(2) | change))
    with pytest.raises(InputError, match=r"zero\.json") as caught:
        zero.read_settings(file)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_no_deepspeed_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "zero.json").write_text(text)
    with pytest.raises(InputError, match="not a DeepSpeed configuration"):
        zero.read_settings(tmp_path / "zero.json")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_itself_reads_the_files(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(str(ROOT / "launch" / f"zero{stage}.json"))
    assert read.zero_optimization_stage == stage
    assert isinstance(read.zero_config.reduce_bucket_size, int)
    assert read.gradient_accumulation_steps == 1


# ---- one process


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_strategy_for_several_needs_several(strategy: str) -> None:
    with pytest.raises(InputError, match=rf"parallel.strategy is {strategy}, but 1 process"):
        Parallel(strategy)


def test_one_process_is_alone() -> None:
    parallel = Parallel("none")
    assert (parallel.strategy, parallel.world, parallel.rank, parallel.is_main) == ("none", 1, 0, True)
    assert parallel.gather("x") == ["x"]
    assert parallel.any(True)
    assert not parallel.any(False)


# ---- what does not go together


@pytest.mark.parametrize(
    ("strategy", "sections", "words"),
    [
        ("zero1", {"precision": {"dtype": "fp16"}}, "key precision.dtype is fp16: zero1"),
        ("zero3", {"optimizer": {"nonfinite": "skip"}}, "key optimizer.nonfinite is skip: an engine of zero3"),
        ("zero2", {"parallel": {"compile": "default"}}, "key parallel.compile: is not offered with zero2"),
        ("ddp", {"parallel": {"offload": True}}, "key parallel.offload: is DeepSpeed's"),
        ("none", {"parallel": {"offload": True}}, "and the strategy is none"),
    ],
)
def test_what_does_not_go_together_is_named(strategy: str, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        must_go_together(config(**sections), strategy)
    assert words in str(caught.value)


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp2"])
def test_what_goes_together(strategy: str) -> None:
    sections: dict[str, Any] = {"precision": {"dtype": "fp16"}, "optimizer": {"nonfinite": "skip"}}
    must_go_together(config(**sections, parallel={"compile": "default"}), strategy)


def test_auto_precision_is_settled_by_the_device_and_a_chosen_one_stays() -> None:
    cpu = torch.device("cpu")
    assert settle(config(), cpu).precision.dtype == "fp32"
    assert settle(config(precision={"dtype": "bf16"}), cpu).precision.dtype == "bf16"
    assert settle(config(), cpu).result_settings()["precision.dtype"] == "fp32", "what a resumed run must share"
