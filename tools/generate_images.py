#!/usr/bin/env python
r"""Paint unlabelled street scenes from prompts, for joint training.

    python tools/generate_images.py --output datasets/stable_diffusion/gta
    python tools/generate_images.py --output datasets/stable_diffusion/xl \
        --model stabilityai/stable-diffusion-xl-base-1.0 --height 1024 --width 1024 --count 1000
    torchrun --nproc-per-node 8 tools/generate_images.py --output datasets/stable_diffusion/gta
    python tools/generate_images.py --generator procedural --height 256 --width 512 --count 300 \
        --output datasets/demo/stable_diffusion/demo

Images go to OUTPUT/images, one line each to OUTPUT/manifest.jsonl; a folder
<root>/stable_diffusion/NAME is the dataset sd_NAME. Prompts are taken in turn, and every image has
a seed of its own, so the same command always gives the same images. A run that was stopped goes on
where it was when it is started again; torchrun shares the images among processes, GPUs and machines
that write to the same folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import USER_ERROR, user_errors_in_one_line

if TYPE_CHECKING:
    from clouds.generation.generators import Generator
    from clouds.generation.work import Plan

# Nothing heavy is imported up here: --help and a mistyped flag answer at once.

MOST_REMARKS = 5
STOPPED = "stopped; the same command goes on from here"
OPTIONS = (
    "model", "scheduler", "steps", "guidance", "negative_prompt", "height", "width", "dtype",
    "device", "batch_size", "offline",
)  # fmt: skip
"""Flags that are handed to the generator when they are given."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to fill")
    add(
        "--prompts", type=Path, default=Path("prompts/street_scenes.txt"), metavar="FILE",
        help="one prompt a line (default: %(default)s)",
    )  # fmt: skip
    add(
        "--generator", default="stable_diffusion", metavar="NAME",
        help="stable_diffusion or procedural (default: %(default)s)",
    )  # fmt: skip
    add("--count", type=int, default=5000, metavar="N", help="images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the whole folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="delete what was generated in OUTPUT before")
    add(
        "--verify", action="store_true",
        help="when going on, paint images again whose content is not what the manifest says",
    )  # fmt: skip
    size = parser.add_argument_group("size of an image, pixels")
    size.add_argument("--height", type=int, metavar="ROWS", help="default: 768")
    size.add_argument("--width", type=int, metavar="COLUMNS", help="default: 768")
    add_diffusion_flags(parser)
    return parser.parse_args(argv)


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of stable_diffusion alone."""
    group = parser.add_argument_group("stable_diffusion")
    add = group.add_argument
    add(
        "--model", metavar="ID",
        help="on the Hugging Face hub, or a local folder (default: stabilityai/stable-diffusion-2)",
    )  # fmt: skip
    add("--offline", action="store_true", default=None, help="use only what is on this machine")
    add(
        "--scheduler", metavar="NAME",
        help="euler, euler-ancestral, heun, ddim, dpm++, unipc, a class of diffusers, or own for "
        "the model's (default: euler)",
    )  # fmt: skip
    add("--steps", type=int, metavar="N", help="of denoising (default: 50)")
    add("--guidance", type=float, metavar="SCALE", help="default: 7.5, or the model's if distilled")
    add("--negative-prompt", metavar="TEXT", help="what should not be seen")
    add("--dtype", metavar="NAME", help="float16 (default on a GPU), bfloat16, float32 (on a CPU)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--batch-size", type=int, metavar="N", help="images at once (default: 4)")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, and run in this process; torchrun has started the others."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with user_errors_in_one_line():
            from clouds.engine.launch import launch
        # The processes only wait for each other before they paint, so gloo is enough on GPUs too.
        launch(run, (args, True), device="cpu")
    else:
        run(args, False)


def run(args: argparse.Namespace, shared: bool) -> None:
    """What each process does; `shared` when torchrun has started it."""
    rank, world_size = 0, 1
    if shared:
        from clouds import comm

        rank, world_size = comm.get_rank(), comm.get_world_size()
    with user_errors_in_one_line(MemoryError, stopped=STOPPED):
        plan = make_plan(args, world_size)
        prepare_once(plan, args, rank, world_size)
        if rank == 0:
            show_remarks(plan)
        paint(plan, rank, world_size)
        finish(plan)


def make_plan(args: argparse.Namespace, world_size: int) -> Plan:
    """Read the prompts and load the generator."""
    from clouds.generation.prompts import read_prompts
    from clouds.generation.work import Plan

    prompts = tuple(read_prompts(args.prompts))
    generator = make_generator(args, world_size)
    return Plan(args.output, generator, prompts, args.count, args.seed)


def make_generator(args: argparse.Namespace, world_size: int) -> Generator:
    """Load the generator with the options that were given, on this process's own GPU."""
    from clouds.generation.generators import build_generator

    options = {key: getattr(args, key) for key in OPTIONS if getattr(args, key) is not None}
    if args.generator == "stable_diffusion" and world_size > 1:
        options["device"] = own_device(options.get("device", "auto"))
    return build_generator(args.generator, options)


def own_device(name: str) -> str:
    """The GPU of this process among those of its machine, unless it is to paint on the CPU."""
    import torch

    if name not in ("auto", "cuda"):
        return name
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(
            f"this is process {local + 1} on its machine, which has {gpus} GPU(s). Start at most "
            "one process per GPU."
        )
    return f"cuda:{local}" if gpus else name


def prepare_once(plan: Plan, args: argparse.Namespace, rank: int, world_size: int) -> None:
    """Let the first process make the folder ready while the others wait."""
    from clouds.generation.work import prepare

    if world_size == 1:
        prepare(plan, args.overwrite, args.verify)
        return

    problem: Exception | None = None
    if rank == 0:
        try:
            prepare(plan, args.overwrite, args.verify)
        except (ValueError, OSError) as error:
            problem = error
    from clouds.comm import all_gather

    failed = any(all_gather(problem is not None))
    if problem is not None:
        raise problem
    if failed:  # the first process says why
        raise SystemExit(USER_ERROR)


def show_remarks(plan: Plan) -> None:
    """Say what of the prompts the generator will not follow."""
    remarks = plan.generator.remarks(plan.prompts)
    for remark in remarks[:MOST_REMARKS]:
        print(f"warning: {remark}", file=sys.stderr)
    if len(remarks) > MOST_REMARKS:
        print(f"warning: … and so for {len(remarks) - MOST_REMARKS} more", file=sys.stderr)


def paint(plan: Plan, rank: int, world_size: int) -> None:
    """Paint this process's share under a progress bar, which the first process shows."""
    import cv2
    from tqdm import tqdm

    from clouds.generation import work

    cv2.setNumThreads(1)  # several processes would get in each other's way

    numbers = work.remaining(plan, rank, world_size)
    share = len(range(rank, plan.count, world_size))
    name = "painting" if world_size == 1 else f"painting, process 1 of {world_size}"
    with tqdm(
        desc=name, total=share, initial=share - len(numbers), unit="image", disable=rank != 0
    ) as bar:
        for _ in work.paint(plan, numbers):
            bar.update()


def finish(plan: Plan) -> None:
    """The process that finishes last shows the result; nobody waits for it."""
    from clouds.generation import work

    if work.remaining(plan):
        return
    sheet = work.write_contact_sheet(plan)
    print(f"{plan.count} images in {plan.output / 'images'}; a few of them: {sheet}")
    folder = plan.output.absolute()
    if folder.parent.name == "stable_diffusion":
        print("Use them:")
        print(f"  export DETECTRON2_DATASETS={folder.parent.parent}")
        print(f"  python tools/check_datasets.py --datasets sd_{folder.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
