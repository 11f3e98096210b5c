"""A model file as an MLflow model: packed, sent to a run, registered, and fetched again.

The folder holds the model file, a loader module named in ``MLmodel``, this package's own code (dctc is on no package
index) and the versions to install. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dctc.tracking.found import open_client
from dctc.tracking.remote import shown
from dctc.tracking.store import load_mlflow
from shards.errors import InputError

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

LOADER = "dctc.serving"
MODEL_FILE = "model.safetensors"
INSIDE = f"data/{MODEL_FILE}"  # where MLflow puts it in the folder
ARTIFACT = "model"  # of a run: runs:/ID/model
EXPERIMENT = "models"  # of model files whose own run the server does not know
SCHEMES = ("models:/", "runs:/")
REQUIREMENTS = ("mlflow", "numpy", "pydantic", "safetensors", "torch")
CODE = Path(__file__).resolve().parents[2]


def package(file: Path, folder: Path, net: str) -> None:
    """Write the MLflow model ``folder`` of a model file; ``net`` predicts unless a caller asks for another.

    Raises:
        Exception: whatever MLflow raises, an OSError for a folder that is there or cannot be written.
    """
    load_mlflow()
    import mlflow.pyfunc

    about = describe(file)
    warnings.filterwarnings("ignore", message=".*input example was not provided")  # large as JSON; the signature tells
    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
    if about["network"].get("backbone"):
        requirements.append("timm")
    with tempfile.TemporaryDirectory() as work:
        code = _copied_code(Path(work) / "code")
        weights = Path(work) / MODEL_FILE
        shutil.copyfile(file, weights)
        mlflow.pyfunc.save_model(
            folder, loader_module=LOADER, data_path=str(weights), code_paths=[str(part) for part in code],
            pip_requirements=requirements, signature=signature(about, net), infer_code_paths=False,
            metadata={key: about[key] for key in ("bands", "classes", "dtype", "tile_size", "method", "dataset")},
        )  # fmt: skip


def describe(file: Path) -> dict[str, Any]:
    """What a model file says of itself; raises :class:`InputError` when it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {})["dctc"])
        return about
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file}: not a model file of dctc ({error!r})") from None


def signature(about: Mapping[str, Any], net: str) -> ModelSignature:
    """Pixels [image, height, width, band] of the model's pixel type in, class ids uint8 [image, height, width] out."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    pixels = TensorSpec(np.dtype(about["dtype"]), (-1, -1, -1, len(about["bands"])))
    params = [ParamSpec("net", DataType.string, net), ParamSpec("nodata", DataType.double, None)]
    ids = TensorSpec(np.dtype("uint8"), (-1, -1, -1))
    return ModelSignature(Schema([pixels]), Schema([ids]), ParamSchema(params))


def _copied_code(folder: Path) -> list[Path]:
    for name in ("dctc", "shards"):
        shutil.copytree(CODE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return [folder / name for name in ("dctc", "shards")]


def log_model(client: MlflowClient, run_id: str, file: Path, net: str, path: str = ARTIFACT) -> str:
    """Send a model file to a run as the MLflow model ``path``; returns its address. May be repeated."""
    with tempfile.TemporaryDirectory() as work:
        package(file, Path(work) / "packed", net)
        client.log_artifacts(run_id, str(Path(work) / "packed"), path)
    return f"{str(client.get_run(run_id).info.artifact_uri).rstrip('/')}/{path}"


def register(client: MlflowClient, name: str, source: str, run_id: str) -> str:
    """Make the version of the registered model ``name`` that lies at ``source``, once; returns its URI.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    quoted = name.replace("'", "''")
    known = [v for v in client.search_model_versions(f"name='{quoted}'") if (v.source, v.run_id) == (source, run_id)]
    found = known[0] if known else client.create_model_version(name, source, run_id)
    return f"models:/{name}/{found.version}"


def register_file(file: Path, net: str, name: str, uri: str) -> str:
    """Send a model file to its own run, or to a new one when the server has not got that, and register it there.

    Raises:
        InputError: no such server, or it refuses.
    """
    from mlflow.exceptions import MlflowException

    if any(character in name for character in "#?%"):
        raise InputError(f"--register {name}: an address models:/NAME cannot have # ? or %, choose another name")
    client = open_client(uri)
    about = describe(file)
    content = hashlib.sha256(file.read_bytes() + net.encode()).hexdigest()[:12]
    try:
        run_id = _run_for(client, about, content)
        return register(client, name, log_model(client, run_id, file, net, f"registered/{content}"), run_id)
    except (MlflowException, OSError) as error:  # of the system: a full folder of temporary files, say
        raise InputError(
            f"--register {name}: {shown(uri)} does not take it ({str(error)[:300].splitlines()[0]})"
        ) from None


def _run_for(client: MlflowClient, about: Mapping[str, Any], content: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(about["run_id"]).info.run_id) if about["run_id"] else _own_run(client, content)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return _own_run(client, content)


def _own_run(client: MlflowClient, content: str) -> str:
    from dctc.tracking.remote import experiment_of

    experiment = experiment_of(client, EXPERIMENT)
    found = client.search_runs([experiment], f"tags.model_digest = '{content}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment, run_name=content, tags={"model_digest": content})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def is_uri(model: str) -> bool:
    """Whether a MODEL argument names something on an MLflow server and not a file."""
    return model.startswith(SCHEMES)


@contextmanager
def model_file(model: str, uri: str) -> Iterator[Path]:
    """The model file that ``model`` names: a file, an MLflow model folder, or ``models:/NAME/VERSION``,
    ``models:/NAME@ALIAS``, ``runs:/ID``, ``runs:/ID/model`` or ``runs:/ID/FILE.safetensors`` on the server ``uri``.

    What is fetched is the safetensors file alone, and it is gone afterwards.

    Raises:
        InputError: no such database, or the server does not give such a model.
    """
    if not is_uri(model):
        folder = Path(model)
        yield folder / INSIDE if (folder / "MLmodel").exists() else folder
        return
    load_mlflow()
    open_client(uri)
    import mlflow.artifacts

    plain = model.rstrip("/")
    if plain.startswith("runs:/") and "/" not in plain.removeprefix("runs:/"):
        plain = f"{plain}/{ARTIFACT}"
    wanted = plain if plain.endswith(".safetensors") else f"{plain}/{INSIDE}"
    with tempfile.TemporaryDirectory() as work:
        try:
            found = mlflow.artifacts.download_artifacts(wanted, dst_path=work, tracking_uri=uri, registry_uri=uri)
        except Exception as error:  # MLflow's own, and those of whatever store it reads
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{model}: {shown(uri)} gives no such model of dctc ({reason}); MLFLOW_TRACKING_URI names the server"
            ) from None
        yield Path(found)
