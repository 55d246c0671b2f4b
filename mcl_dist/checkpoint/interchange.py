"""Encoders to and from files that other programs read: safetensors, the reference's names, TorchScript, ONNX.

Equal weights give equal bytes in every format, by the same version of PyTorch.
"""

from __future__ import annotations

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

from mcl_dist.checkpoint import load_network
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, EncoderConfig
from mcl_dist.model.pretrained_weights import read_state, to_reference, under_our_names

FILES = (".safetensors", ".pth", ".pt", ".tar")
CLIPS = "clips"  # key of a file's only metadata; several would be written in any order
OPSET = 17
CLASS_NUMBER = re.compile(rb"(?<=___torch_mangle_)\d+")
OF_THE_PLACE = (".debug_pkl", "/serialization_id")  # records of where the source lay, and a digest of all
HEADS = {"inter", "intra", "order", "order_classifier"}
TRACED = (2, 3)  # clips and colours of the input that tracing runs; any number of clips goes through afterwards


class FeatureExtractor(nn.Module):
    """Normalised clips (B, 3, T, H, W) to pooled features (B, C)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """The encoder's pooled features alone."""
        pooled: torch.Tensor = self.encoder(clips).pooled
        return pooled


def load_encoder(path: str) -> Encoder:
    """An encoder in evaluation mode.

    Args:
        path: a run folder or a `step-…` folder (paths or URLs); or a file: what `mcl export` wrote as `safetensors` or
            `reference`, a checkpoint of the reference, or a 2-D ResNet (MoCo-v2's), which is inflated.

    Raises:
        UserError: when there is none, or it holds no such encoder.
    """
    if not is_file(path):
        network, _ = load_network(path)
        return network.encoder.eval()
    state = under_our_names(read_state(Path(path)), mlp_head=False)
    encoder = Encoder(_architecture(state, path))
    own = encoder.state_dict()
    given = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    for name, value in own.items():
        if name not in given and name.endswith("num_batches_tracked"):
            given[name] = value
        if name not in given or given[name].shape != value.shape:
            found = tuple(given[name].shape) if name in given else "missing"
            raise UserError(
                f"{path}: encoder.{name} is {found}, must be {tuple(value.shape)}; it is no R(2+1)D encoder"
            )
    encoder.load_state_dict({name: given[name] for name in own})
    return encoder.eval()


def is_file(path: str) -> bool:
    """Whether a path names a weights file rather than a checkpoint folder.

    Raises:
        UserError: it is a file, but its name does not say of which format; or it is elsewhere.
    """
    if Path(path).suffix in FILES and "://" in path:
        raise UserError(f"{path}: weights files are read from this machine's disks alone; copy it here")
    if Path(path).suffix not in FILES and Path(path).is_file():
        raise UserError(f"{path}: ends in none of {', '.join(FILES)}; rename the file, or name a run folder")
    return Path(path).suffix in FILES


def clips_of_file(path: str) -> Mapping[str, int] | None:
    """Frames, stride and crop that an exported encoder was trained on; None where the file does not tell."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get(CLIPS)
    return None if told is None else dict(json.loads(told))


def exported(checkpoint: str, form: str) -> bytes:
    """The bytes of a checkpoint in one of the formats.

    `safetensors` holds encoder and heads under our names, with the clips that it was trained on; `reference` the same
    under the reference's names (as safetensors: no pickle is written). `torchscript` and `onnx` are functions of
    normalised clips (B, 3, T, H, W) with the features (B, C), for the clips' own T, H and W and any B.

    Args:
        checkpoint: a run folder, a `step-…` folder or a file, as for `load_encoder`.
        form: which.

    Raises:
        UserError: no such checkpoint, or one that lacks what the format needs.
    """
    if is_file(checkpoint):
        encoder, clips = load_encoder(checkpoint), clips_of_file(checkpoint)
        given = under_our_names(read_state(Path(checkpoint)), mlp_head=True)
        heads = {name: value for name, value in given.items() if name.partition(".")[0] in HEADS}
        state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()} | heads
        if form == "reference" and (missing := HEADS - {name.partition(".")[0] for name in heads}):
            raise UserError(
                f"{checkpoint}: --format reference needs all heads, and it lacks {', '.join(sorted(missing))}; name a "
                "run folder or a step-… folder"
            )
    else:
        network, config = load_network(checkpoint)
        encoder, state = network.encoder.eval(), network.state_dict()
        clips = {name: int(config["data"][name]) for name in ("frames", "stride", "crop")}
    if form in ("safetensors", "reference"):
        renamed = to_reference(state) if form == "reference" else state
        told = None if clips is None or form == "reference" else {CLIPS: json.dumps(clips)}
        return to_bytes({name: renamed[name].contiguous() for name in sorted(renamed)}, told)
    shape = clips or {"frames": 16, "crop": 224}
    sample = torch.zeros(*TRACED, shape["frames"], shape["crop"], shape["crop"])
    write = _torchscript if form == "torchscript" else _onnx
    with torch.no_grad():
        return write(FeatureExtractor(encoder).eval(), sample)


def _torchscript(extractor: FeatureExtractor, sample: torch.Tensor) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's advice to use torch.export, which needs PyTorch to be loaded
        # The first trace of a class in a process gets its plain name, all others a number: none here is the first.
        torch.jit.trace(extractor, sample[:1], check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.trace(extractor, sample), file)  # type: ignore[no-untyped-call]
    return _renumbered(file.getvalue())


def _renumbered(archive: bytes) -> bytes:
    """TorchScript's archive with its classes numbered from 0, and without the paths of the source."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        records = {name: source.read(name) for name in source.namelist() if not name.endswith(OF_THE_PLACE)}
    numbers: dict[bytes, int] = {}

    def counted(match: re.Match[bytes]) -> bytes:
        return b"%d" % numbers.setdefault(match[0], len(numbers))

    renamed = {}
    for name in sorted(records, key=lambda name: not name.endswith("/data.pkl")):  # which names all classes in order
        content = CLASS_NUMBER.sub(counted, records[name]) if name.endswith((".pkl", ".py")) else records[name]
        renamed[CLASS_NUMBER.sub(counted, name.encode()).decode()] = content
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name in sorted(renamed):
            target.writestr(zipfile.ZipInfo(name), renamed[name])  # whose time is always the same
    return file.getvalue()


def _onnx(extractor: FeatureExtractor, sample: torch.Tensor) -> bytes:
    file = io.BytesIO()
    try:
        import onnx  # noqa: F401  (what PyTorch writes with)
    except ImportError as error:
        raise UserError(
            "--format onnx needs the package onnx; install it with `pip install 'mcl-dist[export]'`"
        ) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter by tracing is the older one; the newer needs onnxscript as well
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


def _architecture(state: Mapping[str, Any], path: str) -> EncoderConfig:
    """Width and blocks as the tensors' names and shapes tell."""
    if "encoder.conv1.weight" not in state:
        raise UserError(f"{path}: holds no encoder (no conv1.weight); name a run folder, an export or a ResNet")
    blocks: list[int] = []
    while f"encoder.layer{len(blocks) + 1}.0.conv1.weight" in state:
        stage = f"encoder.layer{len(blocks) + 1}."
        blocks.append(len({name.split(".")[2] for name in state if name.startswith(stage)}))
    return EncoderConfig(width=len(state["encoder.conv1.weight"]), blocks=tuple(blocks))
