"""``dctc export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dctc.arguments import AsJson, Model, beside_model, loaded_model
from dctc.terminal import out
from shards.errors import InputError


def export(
    model: Model,
    kind: Annotated[
        Literal["onnx", "torch", "mlflow"],
        typer.Option("--format", help="onnx, torch (torch.export) or mlflow (pyfunc)"),
    ],
    net: Annotated[str | None, typer.Option(help="s1, s2, mean, teacher, ...; default: the headline")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="file, folder for mlflow; default: beside the model, or here for a URI")
    ] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="mlflow only: make it a version of NAME on the server instead")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for other programs: raw pixels in, normalisation inside; compared with the model first.

    Example: dctc export runs/synthetic-scene/dctc-1_8-s0/model.safetensors --format onnx
    """
    if register is not None and (kind != "mlflow" or to is not None):
        raise InputError(f"--register {register}: is for --format mlflow without --out; the server keeps the model")
    record: dict[str, Any]
    with loaded_model(model, "cpu") as (bundle, file):
        if kind == "mlflow":
            from dctc.exporting.pyfunc import export_pyfunc, register_pyfunc

            if register is not None:
                record = register_pyfunc(bundle, file, net, register)
            else:
                record = export_pyfunc(bundle, file, to or beside_model(model) / "mlflow-model", net)
        else:
            from dctc.exporting.programs import SUFFIXES, export_program

            name = f"{file.stem}{f'-{net}' if net else ''}{SUFFIXES[kind]}"
            done = export_program(bundle, to or beside_model(model) / name, kind, net)
            record = {"file": str(done.file), "net": done.net, "largest_difference": done.difference}
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        out.print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in record.items()), markup=False)
