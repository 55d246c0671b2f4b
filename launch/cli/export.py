"""`mcl export`: write an encoder as a file for other programs."""

import argparse

from launch.cli.command import Commands, add_command

FORMATS = ("safetensors", "torchscript", "onnx", "reference")
EXAMPLE = """example:
  mcl export runs/ucf101 --format safetensors --out encoder.safetensors
  mcl export runs/ucf101 --format onnx --out encoder.onnx

TorchScript and ONNX take clips (B, 3, T, H, W) of the pre-training's size, RGB from 0 to 1, normalised by ImageNet's
mean and deviation; they return features (B, C). `reference` is safetensors with the reference implementation's names.
"""


def register(commands: Commands) -> None:
    """Add `mcl export`."""
    parser = add_command(commands, "export", run, help="write an encoder for other programs", example=EXAMPLE)
    parser.add_argument("checkpoint", metavar="C", help="run folder, step-… folder, or a weights file")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, metavar="FILE", help="path or URL to write to")


def run(arguments: argparse.Namespace) -> int:
    """Write the file; returns 0."""
    from launch.evaluation.encoder_under_test import resolve_checkpoint
    from mcl_dist.checkpoint.interchange import export_checkpoint
    from mcl_dist.storage.folder import write_file

    data = export_checkpoint(resolve_checkpoint(arguments.checkpoint), arguments.format)
    write_file(arguments.out, data)
    print(f"{arguments.out}: {len(data)} bytes")
    return 0
