"""Writing a net as an ONNX or a torch.export file, compared with the eager model before it has its final name."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dctc.bundle import Bundle
from dctc.exporting.graph import (
    INPUT,
    OUTPUT,
    TOLERANCE,
    Exportable,
    check_net,
    largest_difference,
    metadata,
    samples,
    trace,
)
from shards.errors import InputError

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TORCH_METADATA = "dctc.json"  # the name under which ``torch.export.load(..., extra_files=...)`` gives the metadata
AXES = ("batch", "height", "width")


@dataclass(frozen=True)
class Exported:
    """A written program: its net, and how far its probabilities are from the eager model's at most."""

    file: Path
    net: str
    difference: float


def export_program(bundle: Bundle, file: Path, kind: str, net: str | None = None) -> Exported:
    """Write ``file`` for the runtime ``kind`` ("onnx" or "torch"), read it back, compare it, and then name it.

    Args:
        bundle: on the CPU.

    Raises:
        InputError: no such net, a runtime that is not installed, a network that cannot be exported, a folder that
            cannot be written, or a program whose probabilities are not the eager model's to 1e-4. Nothing is left.
    """
    chosen = check_net(bundle, net)
    if kind == "onnx":
        _require_onnx()
    model = Exportable(bundle, chosen).eval()
    program = _trimmed(trace(model, len(bundle.bands)))
    draft = file.with_name(f".{file.stem}.{os.getpid()}.tmp{SUFFIXES[kind]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write, read = (_write_onnx, _read_onnx) if kind == "onnx" else (_write_torch, _read_torch)
        write(program, draft, metadata(bundle, chosen))
        difference, shape = largest_difference(model, read(draft), samples(bundle))
        if not difference <= TOLERANCE:
            raise InputError(
                f"{file}: not written: for pixels of shape {shape} the exported net {chosen} differs from the model "
                f"by {difference:.1e} in its probabilities (at most {TOLERANCE} is let through)"
            )
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(file)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror or error}); name another place by --out"
        ) from None
    finally:
        with suppress(OSError):
            draft.unlink()
    return Exported(file, chosen, difference)


def _trimmed(program: ExportedProgram) -> ExportedProgram:
    """Without the weights that only nets use which were not asked for."""
    # ReLU in place counts as an effect to torch; where nobody uses its result, it is none.
    program.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or "assert" in str(node.target))
    signature = program.graph_signature
    idle = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    for spec in [spec for spec in signature.input_specs if spec.target and spec.arg.name in idle]:
        signature.input_specs.remove(spec)
        program.graph.erase_node(idle[spec.arg.name])
        program.state_dict.pop(spec.target, None)
    program.graph_module.recompile()
    return program


def _require_onnx() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise InputError(
            f"--format onnx needs {error.name}: pip install -c constraints.txt -e '.[onnx]', or take --format torch"
        ) from None
    del onnx, onnxruntime, onnxscript


def _write_onnx(program: ExportedProgram, file: Path, about: dict[str, str]) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    except Exception as error:  # torch has many for this
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"this network has no ONNX form: {reason[:300]}; take --format torch") from error
    assert made is not None
    proto = made.model_proto
    _name_axes(proto)
    onnx.helper.set_model_props(proto, about)
    proto.producer_name = "dctc"
    onnx.save(proto, file)
    onnx.checker.check_model(os.fspath(file))


def _name_axes(proto: Any) -> None:
    """The symbols that torch invented for the sizes, by their meaning; what it derives from them is forgotten."""
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    names = {shape[axis].dim_param: name for axis, name in zip((0, 2, 3), AXES, strict=True)}
    for info in (*proto.graph.input, *proto.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.dim_param)
    for axis, name in zip((0, 2, 3), AXES, strict=True):
        proto.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = name


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


def _write_torch(program: ExportedProgram, file: Path, about: dict[str, str]) -> None:
    buffer = io.BytesIO()  # on a full disk torch's own writer aborts the interpreter
    torch.export.save(program, buffer, extra_files={TORCH_METADATA: json.dumps(about)})
    file.write_bytes(buffer.getvalue())


def _read_torch(file: Path) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return module
