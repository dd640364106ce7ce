"""The keys of the table under MODEL.BACKBONE.ADAPTER."""

from __future__ import annotations

from clouds.config.key import Key, above, at_least, not_empty, one_of

ADAPTER_KEYS: tuple[Key, ...] = (
    Key(
        "MODEL.BACKBONE.ADAPTER.NAME",
        "none",
        "What trains in the backbone: 'lora', 'rein', 'soma', 'recycle' (its own weights stay "
        "frozen), 'full' (all of it, whatever MODEL.BACKBONE.FREEZE is), 'none', or a registered "
        "name.",
        not_empty,
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.FULL.LAYER_DECAY",
        1.0,
        "Factor of the learning rate from a block, or stage, to the one before it.",
        above(0),
    ),
    Key("MODEL.BACKBONE.ADAPTER.LORA.RANK", 16, "Rank r of LoRA's updates.", at_least(1)),
    Key(
        "MODEL.BACKBONE.ADAPTER.LORA.ALPHA",
        16.0,
        "LoRA's updates are multiplied by it and divided by the rank.",
        above(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.LORA.FIRST_BLOCK",
        0,
        "First block, or stage, with LoRA's updates, counted from 0.",
        at_least(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.REIN.NUM_TOKENS",
        100,
        "Rein's tokens per block; with MODEL.BACKBONE.ADAPTER.REIN.LINK_QUERIES as many as "
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES.",
        at_least(2),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.REIN.RANK",
        16,
        "Rank of the product that Rein's tokens are; 0: tokens of their own, without factors.",
        at_least(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.REIN.LINK_QUERIES",
        True,
        "The mask decoder's queries are computed from Rein's tokens, instead of embeddings of its "
        "own.",
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.REIN.SOFTMAX",
        True,
        "Softmax of the similarities of features and tokens.",
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.REIN.ZERO_START",
        False,
        "Rein starts from the frozen network, with a last layer of zeros and no learned scale.",
    ),
    Key("MODEL.BACKBONE.ADAPTER.SOMA.RANK", 16, "Rank r of SoMA's updates.", at_least(1)),
    Key(
        "MODEL.BACKBONE.ADAPTER.SOMA.ALPHA",
        16.0,
        "SoMA's updates are multiplied by it and divided by the rank.",
        above(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.SOMA.FIRST_BLOCK",
        8,
        "First block with SoMA's updates, counted from 0; the blocks before stay frozen.",
        at_least(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.SOMA.COMPONENTS",
        "smallest",
        "Singular values along which SoMA's updates start: the 'smallest', or the 'largest' (the "
        "ablation of its paper, which is PiSSA).",
        one_of("smallest", "largest"),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.SOMA.START",
        "paper",
        "SoMA's updates start as the smallest singular components of the weight, which keeps the "
        "rest ('paper'), or of torch's initial matrix, added to the whole weight ('published': "
        "what the published code and its checkpoints have).",
        one_of("paper", "published"),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.RECYCLE.RANK",
        32,
        "Rank of RecycleLoRA's main updates, of minor directions.",
        at_least(1),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.RECYCLE.SUB_RANK",
        4,
        "Rank of RecycleLoRA's sub updates, of major directions; published: 4 from synthetic "
        "sources, 2 from real ones; 0: none.",
        at_least(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.RECYCLE.ALPHA",
        1.0,
        "RecycleLoRA's updates are multiplied by it and divided by the sum of both ranks.",
        above(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.RECYCLE.SUB_LR_FACTOR",
        0.5,
        "Learning rate of RecycleLoRA's sub updates, relative to that of the main ones.",
        at_least(0),
    ),
    Key(
        "MODEL.BACKBONE.ADAPTER.RECYCLE.FIRST_BLOCK",
        0,
        "First block with RecycleLoRA's updates, counted from 0.",
        at_least(0),
    ),
)
