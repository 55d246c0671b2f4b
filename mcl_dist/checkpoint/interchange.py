"""Import and export of encoders: safetensors under our or the reference's names, TorchScript, ONNX.

With the same version of PyTorch, equal weights give equal bytes in every format.
"""

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from mcl_dist.checkpoint.reader import load_network
from mcl_dist.checkpoint.state import Tensors
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, EncoderConfig
from mcl_dist.model.pretrained_weights import convert_state_dict, read_state_dict, to_reference

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar")
CLIPS = "clips"  # the only metadata key of a file: safetensors writes several keys in no fixed order
OPSET = 17
CLASS_NUMBER = re.compile(rb"(?<=___torch_mangle_)\d+")
SOURCE_RECORDS = (".debug_pkl", "/serialization_id")  # paths of the source, and a digest of all records
HEADS = {"inter", "intra", "order", "order_classifier"}
TRACED_SIZES = (2, 3)  # clips and channels of the traced input; the result accepts any number of clips


class FeatureExtractor(nn.Module):
    """Normalised clips (B, 3, T, H, W) to pooled features (B, C)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """The encoder's pooled features."""
        pooled: torch.Tensor = self.encoder(clips).pooled
        return pooled


def load_encoder(path: str) -> Encoder:
    """An encoder in evaluation mode.

    Args:
        path: a run folder or a `step-…` folder (path or URL); or a file: an `mcl export` of format `safetensors` or
            `reference`, a checkpoint of the reference, or a 2-D ResNet (such as MoCo-v2's), which is inflated.

    Raises:
        UserError: there is no such file or checkpoint, or it does not hold such an encoder.
    """
    if not is_weights_file(path):
        return load_network(path)[0].encoder.eval()
    state = convert_state_dict(read_state_dict(Path(path)), mlp_head=False)
    encoder = Encoder(_infer_config(state, path))
    own = encoder.state_dict()
    given = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    for name, value in own.items():
        if name not in given and name.endswith("num_batches_tracked"):
            given[name] = value
        if name not in given or given[name].shape != value.shape:
            found = tuple(given[name].shape) if name in given else "missing"
            raise UserError(
                f"{path}: encoder.{name} is {found}, must be {tuple(value.shape)}; it is not an R(2+1)D encoder"
            )
    encoder.load_state_dict({name: given[name] for name in own})
    return encoder.eval()


def is_weights_file(path: str) -> bool:
    """Whether a path names a weights file rather than a checkpoint folder.

    Raises:
        UserError: the weights file is not on a local disk, or a file's suffix does not name a format.
    """
    if Path(path).suffix in WEIGHTS_SUFFIXES and "://" in path:
        raise UserError(f"{path}: weights files are read from local disks only; copy it to this machine")
    if Path(path).suffix not in WEIGHTS_SUFFIXES and Path(path).is_file():
        raise UserError(f"{path}: ends in none of {', '.join(WEIGHTS_SUFFIXES)}; rename the file, or name a run folder")
    return Path(path).suffix in WEIGHTS_SUFFIXES


def read_clip_settings(path: str) -> Mapping[str, int] | None:
    """Frames, stride and crop of an exported encoder's training clips; None if the file does not record them."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        settings = (file.metadata() or {}).get(CLIPS)
    return None if settings is None else dict(json.loads(settings))


def export_checkpoint(checkpoint: str, file_format: str) -> bytes:
    """The bytes of a checkpoint, which is as for `load_encoder`, in one of the formats.

    `safetensors` holds encoder and heads under our names, and the settings of the training clips. `reference` holds the
    same tensors under the reference's names, as safetensors: no pickle is written. `torchscript` and `onnx` are
    functions from normalised clips (B, 3, T, H, W) to features (B, C), for the training clips' T, H and W and any B.

    Raises:
        UserError: there is no such checkpoint, or it lacks tensors that the format needs.
    """
    read = _read_file if is_weights_file(checkpoint) else _read_run
    encoder, state, clips = read(checkpoint)
    if file_format == "reference":
        if missing := HEADS - {name.partition(".")[0] for name in state}:
            raise UserError(
                f"{checkpoint}: --format reference needs all heads, and it lacks {', '.join(sorted(missing))}; name a "
                "run folder or a step-… folder"
            )
        return _safetensors(to_reference(state), None)
    if file_format == "safetensors":
        return _safetensors(state, clips)
    shape = clips or {"frames": 16, "crop": 224}
    sample = torch.zeros(*TRACED_SIZES, shape["frames"], shape["crop"], shape["crop"])
    write = _torchscript if file_format == "torchscript" else _onnx
    with torch.no_grad():
        return write(FeatureExtractor(encoder).eval(), sample)


def _read_file(path: str) -> tuple[Encoder, Tensors, Mapping[str, int] | None]:
    """Encoder, state dict under our names, and clip settings of a weights file."""
    encoder, clips = load_encoder(path), read_clip_settings(path)
    given = convert_state_dict(read_state_dict(Path(path)), mlp_head=True)
    heads = {name: value for name, value in given.items() if name.partition(".")[0] in HEADS}
    return encoder, {f"encoder.{name}": value for name, value in encoder.state_dict().items()} | heads, clips


def _read_run(url: str) -> tuple[Encoder, Tensors, Mapping[str, int]]:
    """Encoder, state dict and clip settings of a checkpoint folder."""
    network, config = load_network(url)
    clips = {name: int(config["data"][name]) for name in ("frames", "stride", "crop")}
    return network.encoder.eval(), network.state_dict(), clips


def _safetensors(state: Mapping[str, torch.Tensor], clips: Mapping[str, int] | None) -> bytes:
    metadata = None if clips is None else {CLIPS: json.dumps(clips)}
    return to_bytes({name: state[name].contiguous() for name in sorted(state)}, metadata)


def _torchscript(extractor: FeatureExtractor, sample: torch.Tensor) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.export, whose files need PyTorch to be loaded
        # The first trace of a class in a process keeps its name, later ones get a number: make this trace a later one.
        torch.jit.trace(extractor, sample[:1], check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.trace(extractor, sample), file)  # type: ignore[no-untyped-call]
    return _renumber_classes(file.getvalue())


def _renumber_classes(archive: bytes) -> bytes:
    """A TorchScript archive with classes numbered from 0 and without paths of the source."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        records = {name: source.read(name) for name in source.namelist() if not name.endswith(SOURCE_RECORDS)}
    numbers: dict[bytes, int] = {}

    def renumber(match: re.Match[bytes]) -> bytes:
        return b"%d" % numbers.setdefault(match[0], len(numbers))

    renamed = {}
    for name in sorted(records, key=lambda name: not name.endswith("/data.pkl")):  # it names all classes in order
        content = CLASS_NUMBER.sub(renumber, records[name]) if name.endswith((".pkl", ".py")) else records[name]
        renamed[CLASS_NUMBER.sub(renumber, name.encode()).decode()] = content
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name in sorted(renamed):
            target.writestr(zipfile.ZipInfo(name), renamed[name])  # with a constant time stamp
    return file.getvalue()


def _onnx(extractor: FeatureExtractor, sample: torch.Tensor) -> bytes:
    file = io.BytesIO()
    try:
        import onnx  # noqa: F401  (PyTorch writes with it)
    except ImportError as error:
        raise UserError(
            "--format onnx needs the package onnx; install it with `pip install 'mcl-dist[export]'`"
        ) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated; the newer one also needs onnxscript
        torch.onnx.export(
            extractor,
            (sample,),
            file,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=["clips"],
            output_names=["features"],
            dynamic_axes={"clips": {0: "batch"}, "features": {0: "batch"}},
        )
    return file.getvalue()


def _infer_config(state: Mapping[str, Any], path: str) -> EncoderConfig:
    """The encoder's configuration, inferred from names and shapes of its tensors."""
    if "encoder.conv1.weight" not in state:
        raise UserError(f"{path}: holds no encoder (no conv1.weight); name a run folder, an export or a ResNet")
    blocks: list[int] = []
    while f"encoder.layer{len(blocks) + 1}.0.conv1.weight" in state:
        stage = f"encoder.layer{len(blocks) + 1}."
        blocks.append(len({name.split(".")[2] for name in state if name.startswith(stage)}))
    return EncoderConfig(width=len(state["encoder.conv1.weight"]), blocks=tuple(blocks))
