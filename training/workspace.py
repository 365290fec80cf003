"""Where training keeps what it makes, and the flags that every training script shares."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT = Path(__file__).with_name("runs")


def add_work_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a script its --work flag."""
    parser.add_argument("--work", type=Path, default=DEFAULT, help="folder for artwork, caches and checkpoints")
    return parser


def add_scenes_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a script its --scenes flag."""
    parser.add_argument("--scenes", action="store_true", help="for the model of 256 pixels, which draws scenes")
    return parser


def add_training_arguments(parser: argparse.ArgumentParser, minutes: float, batch: int, rate: float):
    """Flags of a training script: how long, on what, how fast, and whether to go on from the checkpoint."""
    add_work_argument(parser)
    parser.add_argument("--minutes", type=float, default=minutes, help="time to train, over all resumed runs")
    parser.add_argument("--steps", type=int, help="train this many steps instead of --minutes")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (bfloat16 autocast there)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on the CPU, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    return parser
