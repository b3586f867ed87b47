"""Kill a compilation at random moments, resume it, and compare the artefacts byte by byte.

    python tools/kill_and_resume.py 1.4b --kills 20 --max-memory 6GB --samples 8 --length 128

The model is a folder or a published size; of a size, weights are drawn at random and written first,
in bfloat16, with a tokenizer of bytes.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssmc.bench.sizes import find_size
from ssmc.demo import model_folder


def draw_model(name: str, folder: Path) -> Path:
    """A folder with a model of a published size, random weights, and the embedded tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        module: Any = find_size(name).module("cpu")
        module.bfloat16().save_pretrained(folder)
        shutil.copy(model_folder() / "tokenizer.json", folder)
    return folder


def start(model: Path, out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """`ssmc compile` in a process of its own."""
    command = [sys.executable, "-m", "ssmc", "compile", str(model), "-o", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def undisturbed(model: Path, out: Path, options: list[str]) -> float:
    """Compile to `out`; the seconds that took."""
    began = time.monotonic()
    if start(model, out, options).wait():
        raise SystemExit("the compilation failed")
    return time.monotonic() - began


def killed(model: Path, out: Path, options: list[str], kills: int, seconds: float) -> Iterator[int]:
    """Compile to `out` through so many kills, the next at most `seconds` away.

    Where it ends before the last of them, how many there were is yielded, and it begins anew.
    """
    draw, count = random.Random(0), 0
    while True:
        process = start(model, out, [*options, "--resume", "--force"])
        try:
            wait = draw.uniform(0, seconds) if count < kills else None
            if process.wait(wait):
                raise SystemExit("the compilation failed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            count += 1
            size = sum(p.stat().st_size for p in _progress(out).glob("*.safetensors"))
            print(f"kill {count} after {wait:.0f} s: {size / 1e6:.0f} MB of progress", flush=True)
            continue
        yield count
        if count >= kills:
            return


def _progress(out: Path) -> Path:
    return out.with_name(f"{out.name}.progress")


def main() -> None:
    """Compile undisturbed and through kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or 130m to 2.8b, mamba2-130m to mamba2-2.7b")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--within", type=float, help="seconds a run lasts, at most (half a whole)")
    parser.add_argument("--work", type=Path, default=Path("kill-and-resume"))
    given, options = parser.parse_known_args()
    given.work.mkdir(parents=True, exist_ok=True)
    folder = Path(given.model)
    model = folder if folder.is_dir() else draw_model(given.model, given.work / given.model)
    whole, resumed = given.work / "whole", given.work / "resumed"
    for out in (whole, resumed, _progress(resumed)):
        shutil.rmtree(out, ignore_errors=True)
    seconds = undisturbed(model, whole, options)
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    names = sorted(os.listdir(whole))
    for count in killed(model, resumed, options, given.kills, given.within or seconds / 2):
        _, different, missing = filecmp.cmpfiles(whole, resumed, names, shallow=False)
        if different or missing:
            raise SystemExit(f"after {count} kills it differs: {', '.join(different + missing)}")
        print(f"after {count} kills equal: {', '.join(names)}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak memory of a process {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
