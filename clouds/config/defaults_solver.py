"""The keys of optimization, SOLVER."""

from __future__ import annotations

from clouds.config.key import (
    Key,
    above,
    at_least,
    one_of,
    within,
)

SOLVER_KEYS: tuple[Key, ...] = (
    Key("SOLVER.OPTIMIZER", "ADAMW", "Optimizer.", one_of("ADAMW", "SGD")),
    Key("SOLVER.IMS_PER_BATCH", 8, "Images per iteration over all GPUs.", at_least(1)),
    Key(
        "SOLVER.ACCUMULATE",
        1,
        "Parts into which each process divides its images of SOLVER.IMS_PER_BATCH, one in memory "
        "at a time; their gradients are added, which gives those of the whole batch.",
        at_least(1),
    ),
    Key(
        "SOLVER.MEMORY_GIB",
        0.0,
        "Memory of a GPU, GiB, for which SOLVER.ACCUMULATE and, if that is not enough, "
        "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING are raised from their values until the estimate "
        "of a step fits nine tenths of it (docs/training.md#memory); 0: they are used as they are.",
        at_least(0),
    ),
    Key(
        "SOLVER.PARALLEL",
        "ddp",
        "With several processes: 'ddp', each has the whole model; 'fsdp', each has a part of its "
        "weights, gradients and optimizer state (docs/cluster.md#sharding).",
        one_of("ddp", "fsdp"),
    ),
    Key("SOLVER.MAX_ITER", 40000, "Training iterations.", at_least(0)),
    Key("SOLVER.BASE_LR", 1e-5, "Learning rate of the head.", above(0)),
    Key("SOLVER.MOMENTUM", 0.9, "Momentum of SGD.", within(0, 1)),
    Key(
        "SOLVER.BACKBONE_MULTIPLIER",
        0.1,
        "Learning rate of a trained backbone relative to the head's.",
        at_least(0),
    ),
    Key("SOLVER.WEIGHT_DECAY", 0.05, "Weight decay.", at_least(0)),
    Key("SOLVER.WEIGHT_DECAY_NORM", 0.0, "Weight decay of norm layers.", at_least(0)),
    Key("SOLVER.WEIGHT_DECAY_EMBED", 0.0, "Weight decay of embeddings.", at_least(0)),
    Key(
        "SOLVER.WEIGHT_DECAY_SCHEDULE",
        "constant",
        "'constant', or 'cosine': the weight decay of every parameter group goes to "
        "SOLVER.WEIGHT_DECAY_END, also from 0 (SoMA).",
        one_of("constant", "cosine"),
    ),
    Key(
        "SOLVER.WEIGHT_DECAY_END",
        1e-5,
        "Weight decay at SOLVER.MAX_ITER with SOLVER.WEIGHT_DECAY_SCHEDULE 'cosine'.",
        at_least(0),
    ),
    Key(
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
        "WarmupMultiStepLR (constant without SOLVER.STEPS below SOLVER.MAX_ITER), WarmupPolyLR, "
        "WarmupCosineLR, whose factors are multiplied by those of the warm-up; or PolyLR, which "
        "starts after it, as in mmengine (Rein, SoMA).",
        one_of("WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR", "PolyLR"),
    ),
    Key(
        "SOLVER.STEPS",
        (),
        "Iterations at which WarmupMultiStepLR multiplies by SOLVER.GAMMA.",
        element=30000,
    ),
    Key("SOLVER.GAMMA", 0.1, "Factor of the learning rate at each of SOLVER.STEPS.", above(0)),
    Key("SOLVER.POLY_LR_POWER", 0.9, "Exponent of WarmupPolyLR and PolyLR.", above(0)),
    Key(
        "SOLVER.POLY_LR_CONSTANT_ENDING",
        0.0,
        "Lower bound of WarmupPolyLR's factor of the learning rate.",
        within(0, 1),
    ),
    Key("SOLVER.WARMUP_ITERS", 10, "Iterations of learning-rate warm-up.", at_least(0)),
    Key(
        "SOLVER.WARMUP_FACTOR",
        1.0,
        "Factor of the learning rate at iteration 0 of the warm-up.",
        within(0, 1),
    ),
    Key("SOLVER.WARMUP_METHOD", "linear", "Warm-up curve.", one_of("linear", "constant")),
    Key("SOLVER.CLIP_GRADIENTS.ENABLED", True, "Clip gradients."),
    Key(
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        "full_model",
        "'full_model': by the norm over all parameters; 'norm', 'value': each parameter by itself.",
        one_of("full_model", "norm", "value"),
    ),
    Key(
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        0.01,
        "Upper bound of the gradient's norm, or with SOLVER.CLIP_GRADIENTS.CLIP_TYPE 'value' of "
        "its elements.",
        above(0),
        allow_inf=True,
    ),
    Key(
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        2.0,
        "p of the p-norm by which SOLVER.CLIP_GRADIENTS.CLIP_TYPE 'full_model' and 'norm' clip.",
        above(0),
        allow_inf=True,
    ),
    Key(
        "SOLVER.WEIGHT_AVERAGE.ENABLED",
        False,
        "Average the weights of all that trains over the iterations; the average is evaluated "
        "beside the last weights, and saved as model_average.pth.",
    ),
    Key(
        "SOLVER.WEIGHT_AVERAGE.DECAY",
        0.9998,
        "Factor of the average in an update, one per iteration (0.9998: the momentum 0.0002 of "
        "mmengine and SoMA).",
        within(0, 1),
    ),
    Key(
        "SOLVER.WEIGHT_AVERAGE.START_ITER",
        0,
        "Iterations after which averaging begins; until then the average is a copy.",
        at_least(0),
    ),
    Key("SOLVER.AMP.ENABLED", False, "Train and evaluate under autocast."),
    Key(
        "SOLVER.AMP.DTYPE",
        "bf16",
        "Type of autocast with SOLVER.AMP.ENABLED; fp16 scales the loss and needs a GPU.",
        one_of("bf16", "fp16"),
    ),
    Key("SOLVER.CHECKPOINT_PERIOD", 5000, "Iterations between checkpoints.", at_least(1)),
    Key(
        "SOLVER.CHECKPOINTS_KEPT",
        3,
        "Number of newest periodic checkpoints to keep, besides the final one; 0: all.",
        at_least(0),
    ),
    Key(
        "SOLVER.BEST_ON",
        "source",
        "What model_best.pth is the best on: 'source', the images of DATASETS.SOURCE_VAL_FRACTION "
        "(no file if that is 0), or 'test', the mean mIoU of DATASETS.TEST, which is no result of "
        "domain generalization; results say so.",
        one_of("source", "test"),
    ),
    Key(
        "SOLVER.CHECKPOINT_ADAPTERS_ONLY",
        False,
        "Leave the frozen backbone out of checkpoints: they have what trains (adapter and head), "
        "and are loaded over the backbone's own weights.",
    ),
)
