"""Images that the model takes, and those that it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_checkpoint import block_image
from tiny_model import tiny_model

from clouds.data.structures import check_image


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def image_of(height=64, width=64):
    return torch.tensor(block_image(height, width)).permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floating_point_images_from_0_to_255_are_as_uint8(model, dtype):
    image = image_of()
    with torch.no_grad():
        expected, found = model([{"image": image}, {"image": image.to(dtype)}])
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], atol=1e-4, rtol=1e-4)


def test_black_images():
    for dtype in (torch.uint8, torch.float32):
        check_image(torch.zeros(3, 8, 8, dtype=dtype))
    check_image(torch.ones(3, 8, 8, dtype=torch.uint8))


def with_value(value):
    image = image_of().float()
    image[0, 3, 4] = value
    return image


WRONG = [
    (image_of() / 255, ValueError, "scale 0 to 1.*Multiply it by 255"),
    (with_value(float("nan")), ValueError, "from nan to nan"),
    (with_value(float("inf")), ValueError, "to inf; allowed are finite"),
    (with_value(-1.0), ValueError, "from -1 to .*the model normalizes images itself"),
    (with_value(256.0), ValueError, "to 256"),
    (image_of().permute(1, 2, 0), ValueError, r"\(64, 64, 3\).*permute"),
    (image_of()[:1], ValueError, r"\(1, 64, 64\).*Repeat a gray channel"),
    (image_of()[None], ValueError, r"\(1, 3, 64, 64\)"),
    (image_of()[:, :0], ValueError, "not empty"),
    (image_of().long(), TypeError, r"int64.*image\.to\(torch\.uint8\)"),
    (block_image(64, 64), TypeError, r"ndarray.*from_numpy"),
]


@pytest.mark.parametrize(("image", "error", "what"), WRONG)
def test_wrong_images_are_refused_wherever_they_come_in(model, image, error, what):
    with pytest.raises(error, match=f"(?i){what}"):
        model.segment([{"image": image, "height": 64, "width": 64}])
    with pytest.raises(error), torch.no_grad():
        model([{"image": image, "height": 64, "width": 64}])


def test_wrong_images_are_refused_in_training(model):
    label = torch.zeros(64, 64, dtype=torch.uint8)
    model.train()
    try:
        with pytest.raises(ValueError, match="Multiply it by 255"):
            model([{"image": image_of() / 255, "sem_seg": label, "seed": 0}])
    finally:
        model.eval()


def test_the_values_of_a_uint8_image_are_not_read():
    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function.__name__ in ("__get__", "numel"), function
            return super().__torch_function__(function, types, args, kwargs or {})

    check_image(image_of().as_subclass(Unreadable))
    with pytest.raises(AssertionError):
        check_image(torch.tensor(np.full((3, 2, 2), 9.0)).as_subclass(Unreadable))
