"""Damaged entries of checkpoints and of `last_checkpoint`: one sentence, no foreign error."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from clouds.config import get_cfg
from clouds.engine import Trainer
from clouds.engine.checkpoint import Checkpointer
from clouds.weights_io import DamagedFileError, read_checkpoint


def saved(folder, **entries):
    Checkpointer(nn.Linear(2, 1), str(folder)).save("model_0000003", **entries)
    return Checkpointer(nn.Linear(2, 1), str(folder))


def test_last_checkpoint_that_is_no_text(tmp_path):
    checkpointer = saved(tmp_path, iteration=3)
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")
    for call in (checkpointer.resume, checkpointer.get_checkpoint_file):
        with pytest.raises(ValueError, match=r"last_checkpoint' is damaged.*Write the name"):
            call()
    with pytest.raises(ValueError, match=r"newest first: model_0000003\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("iteration", [None, "3", 3.5, True, -1, [3], {}])
def test_iteration_that_is_no_number(iteration, tmp_path):
    checkpointer = saved(tmp_path, iteration=3)
    path = tmp_path / "model_0000003.pth"
    torch.save(torch.load(path) | {"iteration": iteration}, path)
    with pytest.raises(ValueError, match=r"model_0000003\.pth' has the entry 'iteration'") as error:
        checkpointer.resume()
    assert repr(iteration) in str(error.value)


def test_damage_that_asks_for_too_much_memory(tmp_path):
    path = tmp_path / "a.pkl"
    content = bytearray(pickle.dumps({"a": np.zeros(3)}))
    content[10] = 1  # the length of the frame, 8 bytes from the third on, is 2**56 and more
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pkl' .*needs more memory than there is"):
        read_checkpoint(path)


def test_archive_whose_table_names_a_place_before_the_file(tmp_path):
    saved(tmp_path, iteration=3)
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(DamagedFileError, match=r"model_0000003\.pth' .* is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("carried", [None, [1], {}, {"config": 3}, {"config": "a: ["}])
def test_resuming_with_a_damaged_config_in_the_checkpoint(carried, tmp_path, caplog):
    trainer = Trainer.__new__(Trainer)
    trainer.cfg, trainer.start_iter, trainer.max_iter = get_cfg(), 3, 10
    trainer.warn_config_changes({"iteration": 2, "clouds": carried})
    assert "not known whether the config has changed: the config in the checkpoint" in caplog.text


@pytest.mark.parametrize(
    "state", [None, 3, {}, {"param_groups": torch.ones(1, 2)}, {"state": {}, "param_groups": [1]}]
)
def test_a_state_of_another_form(state, tmp_path):
    def checkpointer():
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        return Checkpointer(model, str(tmp_path), optimizer=optimizer)

    checkpointer().save("model_0000003", iteration=3)
    path = tmp_path / "model_0000003.pth"
    torch.save(torch.load(path) | {"optimizer": state}, path)
    with pytest.raises(ValueError, match=r"the state of 'optimizer' in .*model_0000003\.pth"):
        checkpointer().resume()
