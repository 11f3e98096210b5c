"""The model of a round's time against numbers computed by hand."""

from __future__ import annotations

import pytest

from benchmarks.scaling import (
    STRATEGIES,
    Call,
    Gpu,
    Line,
    Part,
    Parts,
    fit,
    memory,
    moved,
    on_gpus,
    predict,
    traffic,
    unet,
)

PARTS = Parts(Part(1000, 8, 3), Part(600, 4, 1), Part(400, 4, 2), 10.0, 6.0, 4.0, norm_layers=2)
SMALL = 40  # bytes of the counts of pixels and such: not of weights


def sent(strategy: str, ranks: int) -> float:
    return sum(moved(call, ranks) for call in traffic(strategy, PARTS) if call.bytes > SMALL)


def test_what_steps_and_what_labels_in_a_round() -> None:
    assert PARTS.stepped("numbers") == 1000 + 4 * 600 + 2 * 400 + 2 * 400 == 5000
    assert PARTS.labelling("numbers") == PARTS.held == 1000 + 600 + 2 * 400 == 2400
    # forward of the labels 10 + 6 + 8, three times the forward of what is trained 10 + 4 * 10
    assert PARTS.flops == 24 + 3 * 50


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", 2 * 3 / 4 * 20_000),
        ("fsdp2", 3 / 4 * (2 * 20_000 + 9_600 + 20_000)),
        ("zero1", 3 * 3 / 4 * 20_000),
        ("zero2", 3 * 3 / 4 * 20_000),
        ("zero3", 2 * 3 / 4 * 20_000),
    ],
)
def test_bytes_of_weights_that_a_rank_of_four_sends(strategy: str, expected: float) -> None:
    assert sent(strategy, 4) == expected


def test_calls_of_fsdp2() -> None:
    gather, scatter = traffic("fsdp2", PARTS)[-2:]
    assert (gather.messages, scatter.messages) == (2 * 15 + 8, 15)  # groups: 3 + 4 (1 + 2), labels 3 + 1 + 2 * 2
    assert gather.hideable
    assert scatter.hideable


def test_sync_norm_adds_two_calls_a_layer_and_update() -> None:
    def calls(sync: bool) -> float:
        return sum(call.messages for call in traffic("ddp", PARTS, sync))

    assert calls(True) - calls(False) == 2 * 5 * 2 - 5


def test_memory_of_a_rank_of_four() -> None:
    assert memory("ddp", PARTS, 4).total == 4 * 9_600
    assert memory("fsdp2", PARTS, 4).total == 9_600
    assert memory("zero1", PARTS, 4) == (9_600 + 2_400, 9_600, 4_800)
    assert memory("zero2", PARTS, 4) == (9_600 + 2_400, 2_400, 4_800)
    assert memory("zero3", PARTS, 4) == (9_600 + 4_800, 2_400, 4_800)


def test_a_round_with_and_without_overlap() -> None:
    calls = [Call("all_reduce", 4000, 3, hideable=True), Call("all_gather", 2000, 1)]
    lines = {"all_reduce": Line(0.5, 0.001), "all_gather": Line(0.25, 0.002)}
    # all_reduce: 1.5 + 2 * 1/2 * 4000 * 0.001 = 5.5; all_gather: 0.25 + 1/2 * 2000 * 0.002 = 2.25
    assert predict("ddp", calls, lines, 2, 4.0, 1.0, overlap=0.0).total == pytest.approx(4 + 1 + 5.5 + 2.25)
    assert predict("ddp", calls, lines, 2, 4.0, 1.0, overlap=0.5).total == pytest.approx(4 + 1 + 3.5 + 2.25)
    assert predict("ddp", calls, lines, 2, 40.0, 1.0, overlap=0.5).exposed == pytest.approx(2.25)
    assert predict("fsdp2", calls, lines, 2, 4.0, 1.0, overlap=0.0).step == 0.5


def test_one_gpu_exchanges_nothing() -> None:
    gpu = Gpu(flops=100.0, memory=28.0, inside=1.0, between=1.0)
    for strategy in STRATEGIES:
        seconds = on_gpus(strategy, PARTS, 1, 2, gpu)
        assert (seconds.compute, seconds.step, seconds.exposed) == (2 * 174 / 100, 5000, 0)


def test_links_between_machines() -> None:
    gpu = Gpu(flops=1.0, memory=1.0, inside=8.0, between=2.0, machine=8, latency=1.0, hop=0.5)
    assert gpu.lines(8)["all_reduce"] == Line(1.0, 1 / 8)
    assert gpu.lines(32)["all_reduce"] == Line(1 + 0.5 * (1 + 2), 1 / 2)


def test_a_fit_finds_a_line() -> None:
    line = fit([(size, 0.25 + 0.001 * size) for size in (10.0, 100.0, 5000.0)])
    assert line.latency == pytest.approx(0.25)
    assert line.per_byte == pytest.approx(0.001)


def test_the_unet_of_the_document() -> None:
    parts = unet(64, 512)
    assert [p.numbers for p in (parts.teacher, parts.encoder, parts.decoder)] == [31_214_658, 18_847_168, 12_190_790]
    assert [p.groups for p in (parts.teacher, parts.encoder, parts.decoder)] == [10, 5, 5]
    assert parts.norm_layers == 18


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="no strategy 'fsdp1'"):
        traffic("fsdp1", PARTS)
