"""What CLOUDS expects of the nouns in clouds.d2, whichever side they come from.

`test_both_sides.py` runs this file in a process of its own for each side.
"""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import yaml
from torch import nn

from clouds.config import KEYS, get_cfg
from clouds.d2 import (
    BACKBONE_REGISTRY,
    BACKEND,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    CfgNode,
    DatasetCatalog,
    DatasetEvaluator,
    ImageList,
    MetadataCatalog,
    Registry,
    ShapeSpec,
    backend_version,
    configurable,
)
from clouds.modeling.build import build_model


# -------------------------------------------------------------------------- which side it is
def test_all_nouns_come_from_the_chosen_side():
    ours = [Backbone, ShapeSpec, ImageList, DatasetEvaluator, configurable]
    ours += [type(DatasetCatalog), type(MetadataCatalog)]
    home = {"detectron2": "detectron2.", "embedded": "clouds.d2.embedded"}[BACKEND]
    assert [noun.__module__ for noun in ours if not noun.__module__.startswith(home)] == []
    assert ("detectron2" in sys.modules) == (BACKEND == "detectron2")


def test_names_are_detectron2s_own_objects():
    if BACKEND != "detectron2":
        pytest.skip("the embedded side is in use")
    import detectron2
    from detectron2 import config, data, modeling

    assert CfgNode is config.CfgNode
    assert DatasetCatalog is data.DatasetCatalog
    assert MetadataCatalog is data.MetadataCatalog
    assert META_ARCH_REGISTRY is modeling.META_ARCH_REGISTRY
    assert BACKBONE_REGISTRY is modeling.BACKBONE_REGISTRY
    assert SEM_SEG_HEADS_REGISTRY is modeling.SEM_SEG_HEADS_REGISTRY
    assert backend_version() == detectron2.__version__


# ---------------------------------------------------------------------------------- CfgNode
def small_cfg():
    cfg = CfgNode({"VERSION": 2, "A": 1, "SUB": {"RATE": 0.5, "NAMES": ["x"]}})
    return cfg


def test_cfg_reads_attributes_and_dotted_overrides():
    cfg = small_cfg()
    cfg.merge_from_list(["A", "3", "SUB.NAMES", "['y', 'z']"])
    assert cfg.A == 3
    assert cfg.SUB.NAMES == ["y", "z"]
    assert cfg["SUB"]["RATE"] == 0.5


def test_cfg_inherits_from_base_files_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("A: 7\nSUB:\n  RATE: 0.25\n")
    (tmp_path / "sub" / "leaf.yaml").write_text("_BASE_: ../root.yaml\nSUB:\n  NAMES: [q]\n")
    monkeypatch.chdir("/")
    cfg = small_cfg()
    cfg.merge_from_file(str(tmp_path / "sub" / "leaf.yaml"))
    assert (cfg.A, cfg.SUB.RATE, cfg.SUB.NAMES) == (7, 0.25, ["q"])


def test_cfg_refuses_unknown_keys_and_wrong_types():
    with pytest.raises(KeyError):
        small_cfg().merge_from_other_cfg(CfgNode({"B": 1}))
    with pytest.raises(ValueError):
        small_cfg().merge_from_list(["A", "many"])


def test_cfg_refuses_yaml_that_runs_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("A: !!python/object/apply:os.getpid []\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        small_cfg().merge_from_file(str(path), allow_unsafe=False)


def test_cfg_freezes_clones_and_dumps():
    cfg = small_cfg()
    other = cfg.clone()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.A = 5
    other.SUB.NAMES.append("w")
    assert cfg.SUB.NAMES == ["x"]
    assert cfg.is_frozen()
    cfg.defrost()
    cfg.A = 5
    assert yaml.safe_load(cfg.dump()) == {
        "VERSION": 2,
        "A": 5,
        "SUB": {"RATE": 0.5, "NAMES": ["x"]},
    }


def test_our_defaults_dump_to_plain_yaml():
    loaded = yaml.safe_load(get_cfg().dump())
    for key in KEYS:
        node = loaded
        for name in key.name.split("."):
            node = node[name]
        default = 19 if key.name == "MODEL.SEM_SEG_HEAD.NUM_CLASSES" else key.default
        assert node == (list(default) if isinstance(default, tuple) else default)


# ----------------------------------------------------------------------------- configurable
class Car:
    @configurable
    def __init__(self, wheels, color="red", seats=4):
        self.parts = (wheels, color, seats)

    @classmethod
    def from_config(cls, cfg):
        return {"wheels": cfg.WHEELS, "color": "blue"}


class Van(Car):
    @classmethod
    def from_config(cls, cfg, load=0):
        return {"wheels": cfg.WHEELS + load}


CARS = CfgNode({"WHEELS": 4})


def test_configurable_class_takes_arguments_or_a_config():
    assert Car(3).parts == (3, "red", 4)
    assert Car(wheels=3, seats=2).parts == (3, "red", 2)
    assert Car(CARS).parts == (4, "blue", 4)
    assert Car(cfg=CARS).parts == (4, "blue", 4)


def test_configurable_call_overrides_what_the_config_says():
    assert Car(CARS, color="green", seats=9).parts == (4, "green", 9)


def test_configurable_from_config_gets_the_arguments_it_names():
    assert Van(CARS, load=2, seats=3).parts == (6, "red", 3)
    assert Van(CARS, 2).parts == (6, "red", 4)


def test_configurable_from_config_with_kwargs_gets_all_and_decides_alone():
    class Bus(Car):
        @classmethod
        def from_config(cls, cfg, **rest):
            return {"wheels": sorted(rest), "seats": 50}

    assert Bus(CARS, color="green", extra=1).parts == (["color", "extra"], "red", 50)


def test_configurable_function():
    @configurable(from_config=lambda cfg, times=1: {"a": cfg.WHEELS * times})
    def add(a, b=10):
        """Sum."""
        return a + b

    assert add(1, b=2) == 3
    assert add(CARS) == 14
    assert add(CARS, times=2, b=1) == 9
    assert add.__doc__ == "Sum."


def test_configurable_with_empty_brackets_is_the_same_decorator():
    class Bike:
        @configurable()
        def __init__(self, wheels):
            self.wheels = wheels

        @classmethod
        def from_config(cls, cfg):
            return {"wheels": cfg.WHEELS - 2}

    assert Bike(CARS).wheels == 2


def test_configurable_misuse_is_an_error():
    class Missing:
        @configurable
        def __init__(self):
            pass

    class Unbound:
        @configurable
        def __init__(self):
            pass

        def from_config(self, cfg):
            return {}

    class Misnamed:
        @configurable
        def __init__(self):
            pass

        @classmethod
        def from_config(cls, config):
            return {}

    with pytest.raises(AttributeError, match="from_config"):
        Missing(CARS)
    with pytest.raises(TypeError, match="classmethod"):
        Unbound(CARS)
    with pytest.raises(TypeError, match="cfg"):
        Misnamed(CARS)
    with pytest.raises(AssertionError):

        @configurable
        def not_init(a):
            pass


# ------------------------------------------------------------------------------- registries
@pytest.mark.parametrize(
    "registry", [META_ARCH_REGISTRY, BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY, Registry("NEW")]
)
def test_registry_keeps_what_is_registered_under_its_name(registry):
    def something():
        pass

    something.__name__ = name = f"Something{id(registry)}"
    assert name not in registry
    assert registry.register()(something) is something
    assert name in registry
    assert registry.get(name) is something
    assert (name, something) in list(registry)
    with pytest.raises(AssertionError):
        registry.register(something)
    with pytest.raises(KeyError, match="NoSuchThing"):
        registry.get("NoSuchThing")


# --------------------------------------------------------------------------------- catalogs
def test_dataset_catalog_lists_only_when_asked():
    calls = []

    def listing():
        calls.append(1)
        return [{"file_name": "a.png"}]

    DatasetCatalog.register("conf_lazy", listing)
    assert calls == []
    assert "conf_lazy" in DatasetCatalog
    assert "conf_lazy" in DatasetCatalog.list()
    assert calls == []
    assert DatasetCatalog.get("conf_lazy") == [{"file_name": "a.png"}]
    assert calls == [1]
    DatasetCatalog.remove("conf_lazy")
    assert "conf_lazy" not in DatasetCatalog


def test_dataset_catalog_errors():
    DatasetCatalog.register("conf_known", list)
    with pytest.raises(KeyError, match="conf_known"):
        DatasetCatalog.get("conf_unknown")
    with pytest.raises(AssertionError, match="conf_known"):
        DatasetCatalog.register("conf_known", list)
    with pytest.raises(AssertionError):
        DatasetCatalog.register("conf_no_function", [])
    with pytest.raises(KeyError):
        DatasetCatalog.remove("conf_unknown")


def test_our_datasets_are_registered_once_and_not_looked_at(monkeypatch):
    from clouds.data.datasets import register_all

    monkeypatch.setenv("DETECTRON2_DATASETS", "/no/such/folder")
    register_all()
    names = DatasetCatalog.list()
    register_all()
    assert DatasetCatalog.list() == names
    assert {"gta5", "synthia", "cityscapes_val", "bdd_val", "mapillary_val"} <= set(names)
    meta = MetadataCatalog.get("cityscapes_val")
    assert (meta.stuff_classes[0], meta.stuff_colors[0]) == ("road", [128, 64, 128])
    assert meta.ignore_label == 255
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        DatasetCatalog.get("cityscapes_val")


def test_metadata_is_one_object_per_name():
    first = MetadataCatalog.get("conf_meta")
    assert first.name == "conf_meta"
    assert first.set(stuff_classes=["road"], ignore_label=255) is first
    again = MetadataCatalog.get("conf_meta")
    assert again is first
    assert again.stuff_classes == ["road"]
    assert "conf_meta" in MetadataCatalog.list()
    MetadataCatalog.remove("conf_meta")
    assert MetadataCatalog.get("conf_meta") is not first


def test_metadata_values_cannot_change():
    meta = MetadataCatalog.get("conf_constant")
    meta.ignore_label = 255
    meta.ignore_label = 255
    with pytest.raises(AssertionError, match="ignore_label"):
        meta.ignore_label = 0
    with pytest.raises(AssertionError):
        meta.set(ignore_label=1)
    assert meta.ignore_label == 255


def test_metadata_missing_attribute_says_what_there_is():
    empty = MetadataCatalog.get("conf_empty")
    with pytest.raises(AttributeError) as error:
        empty.colour  # noqa: B018
    assert "colour" in str(error.value)
    assert "conf_empty" in str(error.value)
    meta = MetadataCatalog.get("conf_some").set(palette=[1])
    with pytest.raises(AttributeError, match="palette"):
        meta.colour  # noqa: B018
    assert not hasattr(meta, "colour")
    assert meta.get("colour") is None
    assert meta.get("colour", 3) == 3
    assert meta.get("palette", 3) == [1]


def test_metadata_copies():
    meta = MetadataCatalog.get("conf_copy").set(palette=[1])
    values = meta.as_dict()
    assert values == {"name": "conf_copy", "palette": [1]}
    values["more"] = 1
    assert not hasattr(meta, "more")
    assert copy.deepcopy(meta).palette == [1]
    assert pickle.loads(pickle.dumps(meta)).as_dict() == meta.as_dict()


# ------------------------------------------------------------------------ shapes, backbones
class TinyBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self._out_features = ["res5", "res2"]
        self._out_feature_channels = {"res2": 8, "res3": 16, "res5": 64}
        self._out_feature_strides = {"res2": 4, "res3": 8, "res5": 32}

    def forward(self, images):
        return {"res2": images}


def test_shape_spec():
    assert ShapeSpec(channels=3) == ShapeSpec(3, None, None, None)
    assert ShapeSpec(3, 1, 2, 4).stride == 4
    assert ShapeSpec(channels=3) != ShapeSpec(channels=4)


def test_backbone_describes_its_outputs():
    backbone = TinyBackbone()
    assert isinstance(backbone, nn.Module)
    assert list(backbone.output_shape()) == ["res5", "res2"]
    assert backbone.output_shape()["res2"] == ShapeSpec(channels=8, stride=4)
    assert backbone.size_divisibility == 0
    assert backbone.padding_constraints == {}
    assert list(backbone(torch.zeros(1))) == ["res2"]


def test_backbone_needs_a_forward():
    class NoForward(Backbone):
        pass

    with pytest.raises(TypeError):
        NoForward()


# -------------------------------------------------------------------------------- ImageList
def test_image_list_pads_at_the_bottom_and_right():
    batch = ImageList.from_tensors([torch.ones(1, 2, 3), 2 * torch.ones(1, 3, 1)], pad_value=9.0)
    expected = [
        [[[1, 1, 1], [1, 1, 1], [9, 9, 9]]],
        [[[2, 9, 9], [2, 9, 9], [2, 9, 9]]],
    ]
    assert batch.tensor.tolist() == expected
    assert batch.image_sizes == [(2, 3), (3, 1)]
    assert len(batch) == 2
    assert batch[1].tolist() == [[[2], [2], [2]]]
    assert batch.device == torch.device("cpu")
    assert batch.to(torch.float64).tensor.dtype == torch.float64


@pytest.mark.parametrize(
    ("sizes", "divisibility", "constraints", "expected"),
    [
        ([(5, 7)], 0, None, (5, 7)),
        ([(5, 7)], 1, None, (5, 7)),
        ([(5, 7)], 4, None, (8, 8)),
        ([(8, 16)], 8, None, (8, 16)),
        ([(5, 7), (9, 2)], 32, None, (32, 32)),
        ([(5, 33), (9, 2)], 32, None, (32, 64)),
        ([(5, 7), (9, 2)], 32, {"size_divisibility": 3}, (9, 9)),
        ([(5, 7), (9, 2)], 0, {"square_size": 12}, (12, 12)),
        ([(5, 7)], 0, {"square_size": 12, "size_divisibility": 8}, (16, 16)),
        ([(5, 7)], 4, {"square_size": 0}, (8, 8)),
    ],
)
def test_image_list_size(sizes, divisibility, constraints, expected):
    images = [torch.ones(3, h, w) for h, w in sizes]
    batch = ImageList.from_tensors(images, divisibility, padding_constraints=constraints)
    assert tuple(batch.tensor.shape) == (len(sizes), 3, *expected)
    assert batch.image_sizes == sizes
    assert batch.tensor.sum() == sum(3 * h * w for h, w in sizes)
    assert batch.tensor.is_contiguous()


def test_image_list_of_label_maps_keeps_their_type():
    labels = [torch.full((2, 2), 7, dtype=torch.uint8), torch.full((1, 2), 3, dtype=torch.uint8)]
    batch = ImageList.from_tensors(labels, pad_value=255)
    assert batch.tensor.dtype == torch.uint8
    assert batch.tensor.tolist() == [[[7, 7], [7, 7]], [[3, 3], [255, 255]]]


def test_image_list_copies_and_lets_gradients_through():
    images = [torch.ones(1, 2, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)]
    batch = ImageList.from_tensors(images, 4)
    (2 * batch.tensor).sum().backward()
    assert images[1].grad.tolist() == [[[2, 2]]]
    plain = torch.ones(1, 2, 2)
    ImageList.from_tensors([plain]).tensor.zero_()
    ImageList.from_tensors([plain, plain]).tensor.zero_()
    assert plain.sum() == 4


def test_image_list_misuse_is_an_error():
    with pytest.raises(AssertionError):
        ImageList.from_tensors([])
    with pytest.raises(AssertionError):
        ImageList.from_tensors([torch.ones(3, 2, 2), torch.ones(1, 2, 2)])
    with pytest.raises(AssertionError):
        ImageList.from_tensors(torch.ones(3, 2, 2))


# -------------------------------------------------------------------------------- evaluator
def test_evaluator_interface():
    class Count(DatasetEvaluator):
        def reset(self):
            self.seen = 0

        def process(self, inputs, outputs):
            self.seen += len(outputs)

        def evaluate(self):
            return {"sem_seg": {"seen": self.seen}}

    base = DatasetEvaluator()
    assert base.reset() is None
    assert base.process([], []) is None
    assert base.evaluate() is None
    count = Count()
    count.reset()
    count.process([{}, {}], [1, 2])
    assert count.evaluate() == {"sem_seg": {"seen": 2}}


# ------------------------------------------------------------------------------ build_model
@META_ARCH_REGISTRY.register()
class ConformanceModel(nn.Module):
    @configurable
    def __init__(self, channels):
        super().__init__()
        self.layer = nn.Linear(channels, 1)

    @classmethod
    def from_config(cls, cfg):
        return {"channels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_build_model_from_our_config(device):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ConformanceModel"
    cfg.MODEL.DEVICE = device
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 11
    cfg.freeze()
    model = build_model(cfg)
    assert isinstance(model, ConformanceModel)
    assert tuple(model.layer.weight.shape) == (1, 11)
    assert device == "auto" or model.layer.weight.device.type == "cpu"


def test_build_model_errors_say_what_there_is():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "NoSuchModel"
    with pytest.raises(KeyError, match="ConformanceModel"):
        build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ConformanceModel"
    cfg.MODEL.DEVICE = "cuda:99"
    with pytest.raises(ValueError, match=r"cuda:99.*this machine has \d+"):
        build_model(cfg)
    cfg.MODEL.DEVICE = "gpu"
    with pytest.raises(ValueError, match=r"'gpu'.*'auto'"):
        build_model(cfg)


def test_detectron2s_own_config_and_builder():
    if BACKEND != "detectron2":
        pytest.skip("the embedded side is in use")
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as detectron2_build

    from clouds.config import add_clouds_config

    cfg = detectron2_cfg()
    cfg.MODEL.DEVICE = "cpu"
    add_clouds_config(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7
    cfg.MODEL.META_ARCHITECTURE = "ConformanceModel"
    assert tuple(detectron2_build(cfg).layer.weight.shape) == (1, 19)
    assert tuple(build_model(cfg).layer.weight.shape) == (1, 19)
