"""Stands for `clouds train` in tests: writes results.json as a run would, without torch.

mIoU is 1000 SOLVER.BASE_LR + SEED. Environment: FAIL (a part of the folder of runs that fail), WAIT
(a part of the folder of runs that wait for SIGTERM, unless they have a checkpoint).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def results(seed, miou, iteration, config):
    score = {"mIoU": miou, "pixel-accuracy": 2 * miou, "IoU": {"road": miou, "sky": None}}
    score |= {"images": 3, "unmapped-classes": [], "unscored-classes": []}
    return {
        "protocol": "native",
        "mean": {"mIoU": miou, "mIoU-16": None},
        "datasets": {"bdd_val": score},
        "pseudo-labels": {"sd_x": {"mIoU": {"teacher": miou / 2}, "covered": 1.0}},
        "iteration": iteration,
        "seed": seed,
        "config": config,
        "versions": {"torch": "2.0"},
    }


def main(words):
    first = words.index("--resume") + 1
    first += 2 * (words[first] == "--num-gpus")
    pairs = dict(zip(words[first::2], words[first + 1 :: 2], strict=True))
    folder = Path(pairs["OUTPUT_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "last_checkpoint"
    print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES", "-"), flush=True)
    with (folder / "starts").open("a") as file:
        file.write("resumed\n" if checkpoint.exists() else "new\n")
    start = pairs.get("MODEL.WEIGHTS")
    if start and not Path(start).is_file():
        print(f"error: no weights {start}", flush=True)
        return 3
    (folder / "model_final.pth").touch()
    if os.environ.get("FAIL", "\0") in str(folder):
        print("error: no such data\n", flush=True)
        return 2
    if os.environ.get("WAIT", "\0") in str(folder) and not checkpoint.exists():

        def save(number, frame):
            checkpoint.write_text("model.pth")
            sys.exit(143)

        signal.signal(signal.SIGTERM, save)
        (folder / "ready").touch()
        time.sleep(60)
    rate, seed = float(pairs.get("SOLVER.BASE_LR", "0.01")), int(pairs["SEED"])
    iteration = int(pairs.get("SOLVER.MAX_ITER", "900")) - 1
    content = results(seed, 1000 * rate + seed, iteration, {"SEED": seed})
    (folder / "results.json").write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
