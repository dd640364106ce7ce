"""Sharding (SOLVER.PARALLEL fsdp) in two CPU processes, compared with DistributedDataParallel.

Gradients are summed in another order, so numbers agree up to rounding in float32. Weights are
compared after SGD: AdamW divides by the gradient's own size, so it would show rounding of gradients
that are 0 as steps of full size; of AdamW its averages of the gradients are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from joint_samples import MIXED, generated, source
from run_files import resume, saved
from tiny_adapter import vit_model_config
from tiny_model import tiny_config

from clouds import comm
from clouds.config.check import problems
from clouds.engine import Trainer
from clouds.engine import parallel as parallel_module
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.launch import launch
from clouds.modeling.build import build_seeded

STEPS, BATCH, IMAGES = 3, 4, 3
PLAIN = {"SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 1.0}


def scenario(name, **more):
    """The config of a scenario."""
    if name == "full":  # all of a ViT trains, in two parts per process
        settings = {
            "MODEL__BACKBONE__ACTIVATION_CHECKPOINTING": True,
            "SOLVER__ACCUMULATE": 2,
            "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "norm",
        }
        return vit_model_config("full", **(PLAIN | settings | more))
    if name == "rein":  # a frozen ViT with an adapter, which has a parameter of one number
        return vit_model_config("rein", SOLVER__WEIGHT_AVERAGE__ENABLED=True, **more)
    if name == "lora_bf16":
        return vit_model_config("lora", SOLVER__AMP__ENABLED=True, **(PLAIN | more))
    if name == "joint_rein":  # the teacher has its own adapter
        return vit_model_config("rein", MODEL__CLOUDS__ITERATION_UPDATE=1, **(MIXED | PLAIN | more))
    # a frozen CLIP with text class head, which is the teacher's, too
    return tiny_config(
        MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text",
        MODEL__CLOUDS__GEOMETRIC_ENSEMBLE_EMA=True,
        MODEL__CLOUDS__ITERATION_UPDATE=1,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE="value",
        **(MIXED | PLAIN | more),
    )


SCENARIOS = ("full", "rein", "lora_bf16", "joint_rein", "joint_clip")


def samples(number, joint):
    """A batch; the second half has no generated image, so one of two processes needs no teacher."""
    first = 10 * number + 1
    rest = [source(first + k) for k in (1, 2, 3)]
    return [generated(first) if joint else source(first), *rest]


def batches(start, joint):
    share, rank = BATCH // comm.get_world_size(), comm.get_rank()
    while True:
        yield samples(start, joint)[rank * share : (rank + 1) * share]
        start += 1


def predict(model):
    """Scores of some images, in this process alone."""
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = [model([{"image": source(k)["image"]}])[0]["sem_seg"] for k in range(IMAGES)]
    model.train(training)
    return torch.stack(scores)


def make_trainer(folder, name, kind, **more):
    cfg = scenario(name, SOLVER__PARALLEL=kind, OUTPUT_DIR=str(folder), **more)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.LOG_PERIOD = BATCH, STEPS, 1
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD = 2, 0, 1

    def evaluate():  # the processes evaluate different numbers of images
        if comm.is_main_process():
            torch.save(predict(trainer.model), Path(folder, "scores.pth"))
        return SimpleNamespace(flat=dict, panels={})

    joint = name.startswith("joint")
    loader = lambda start: batches(start, joint)  # noqa: E731
    trainer = Trainer(cfg, loader=loader, evaluate=evaluate)
    return trainer


def continue_from(first, folder):
    """A run folder with the checkpoint after two of three iterations of another run."""
    if comm.is_main_process():
        folder.mkdir()
        shutil.copy(first / "model_0000001.pth", folder)
        (folder / "last_checkpoint").write_text("model_0000001.pth")
    comm.synchronize()
    return folder


def in_two_processes(folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    for name in SCENARIOS:
        for kind in ("ddp", "fsdp"):
            trainer = make_trainer(folder / f"{name}_{kind}", name, kind)
            trainer.train()
            if kind == "fsdp":
                parts = [comm.own_part(p.detach()).numel() for p in trainer.model.parameters()]
                total = sum(p.numel() for p in trainer.model.parameters())
                sizes = comm.all_gather((sum(parts), total))
                (folder / f"{name}_sizes.json").write_text(json.dumps(sizes))
    for name, first, kind in (
        ("full", "fsdp", "fsdp"),
        ("full", "fsdp", "ddp"),
        ("full", "ddp", "fsdp"),
        ("rein", "fsdp", "fsdp"),
        ("joint_rein", "fsdp", "fsdp"),
        ("joint_rein", "ddp", "fsdp"),
    ):
        again = continue_from(folder / f"{name}_{first}", folder / f"{name}_{first}_{kind}")
        resume(make_trainer(again, name, kind))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    launch(in_two_processes, (str(folder),), num_gpus=2, device="cpu", timeout=3600)
    return folder


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    names = ("total_loss", "loss_ce", "loss_mask", "grad_norm")
    return [[line[name] for name in names] for line in lines if "total_loss" in line]


def moments(folder):
    """Name of a parameter -> its state of the optimizer."""
    optimizer = saved(folder)["optimizer"]
    return {
        name: optimizer["state"][index]
        for group in optimizer["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }


def assert_same_weights(first, second, **tolerance):
    one, two = saved(first), saved(second)
    assert one.keys() == two.keys()
    for entry in {"model", "teacher"} & one.keys():
        assert list(one[entry]) == list(two[entry])
        for name, value in one[entry].items():
            torch.testing.assert_close(two[entry][name], value, **tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_losses_and_norms_of_the_gradient_are_those_of_ddp(runs, name):
    # bfloat16 has 8 bits, and passes rounding on
    tolerance = 2e-2 if "bf16" in name else 1e-4
    one, two = (records(runs / f"{name}_{kind}") for kind in ("ddp", "fsdp"))
    assert len(one) == len(two) == STEPS
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    assert one[0][0] != pytest.approx(one[-1][0], rel=1e-4)  # it trains


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "joint_rein", "joint_clip"])
def test_weights_are_those_of_ddp(runs, name):
    assert_same_weights(runs / f"{name}_ddp", runs / f"{name}_fsdp", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_state_of_adamw_and_averaged_weights_are_those_of_ddp(runs):
    one, two = (moments(runs / f"rein_{kind}") for kind in ("ddp", "fsdp"))
    assert one.keys() == two.keys()
    for name, state in one.items():
        assert state["step"] == two[name]["step"] == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            size = float(state[key].abs().max())
            torch.testing.assert_close(
                two[name][key], state[key], rtol=1e-3, atol=1e-3 * size + 1e-9, msg=name
            )
    final = saved(runs / "rein_fsdp")
    decay = 0.9998
    first = torch.load(runs / "rein_fsdp/model_0000001.pth", weights_only=True)
    for name, value in final["average"].items():
        expected = decay * first["average"][name] + (1 - decay) * final["model"][name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_process_has_about_half_of_the_parameters(runs, name):
    sizes = json.loads((runs / f"{name}_sizes.json").read_text())
    total = sizes[0][1]
    for part, _ in sizes:
        # a parameter with an odd number of rows is divided unevenly, one of one number is whole
        assert part / total == pytest.approx(0.5, abs=0.02)
    assert sum(part for part, _ in sizes) >= total


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_process_alone_loads_the_checkpoint_and_predicts_what_training_did(runs, name):
    model = build_seeded(scenario(name))
    # with an average of the weights, that is evaluated last
    file = "model_average.pth" if name == "rein" else "model_final.pth"
    Checkpointer(model).load(str(runs / f"{name}_fsdp" / file), checkpointables=[])
    scores = predict(model)
    found = torch.load(runs / f"{name}_fsdp/scores.pth", weights_only=True)
    torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "rein", "joint_rein"])
def test_resuming_is_exact(runs, name):
    assert_same_weights(runs / f"{name}_fsdp", runs / f"{name}_fsdp_fsdp", rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("full", "fsdp_ddp"), ("full", "ddp_fsdp"), ("joint_rein", "ddp_fsdp")]
)
def test_resuming_with_the_other_kind(runs, names):
    name, kinds = names
    assert_same_weights(runs / f"{name}_ddp", runs / f"{name}_{kinds}", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "joint_rein"])
def test_resuming_in_one_process(runs, name, tmp_path):
    folder = continue_from(runs / f"{name}_fsdp", tmp_path / "one")
    accumulated = {"SOLVER__ACCUMULATE": 4} if name == "full" else {}
    resume(make_trainer(folder, name, "fsdp", **accumulated))
    assert_same_weights(runs / f"{name}_fsdp", folder, rtol=1e-4, atol=1e-5)


def test_what_sharding_does_not_support_is_an_error():
    def messages(**settings):
        return "\n".join(problems(tiny_config(SOLVER__PARALLEL="fsdp", **settings)))

    assert "SOLVER.PARALLEL" not in messages()
    assert "MODEL.COMPILE 'all'" in messages(MODEL__COMPILE="all")
    adapter = {"MODEL__BACKBONE__ADAPTER__NAME": "soma", "MODEL__WEIGHTS_PARTIAL": True}
    assert "cannot start the adapter soma" in messages(**adapter)
    assert "allowed is" in "\n".join(problems(tiny_config(SOLVER__PARALLEL="zero")))


def test_an_older_torch_is_an_error(monkeypatch):
    monkeypatch.setattr(parallel_module, "fully_shard", lambda module, mesh=None: module)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"needs torch 2.7 or newer, and .* is installed"):
        parallel_module.place(
            tiny_config(SOLVER__PARALLEL="fsdp"), torch.nn.Linear(2, 2), torch.device("cpu")
        )
