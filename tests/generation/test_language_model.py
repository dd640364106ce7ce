"""Answers of a real, tiny and random Llama, with and without a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_models import TEMPLATE, VOCABULARY, save_tiny_llama

from clouds.generation.language_model import load_language_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        name: save_tiny_llama(tmp_path_factory.mktemp(name), template)
        for name, template in (("plain", None), ("chat", TEMPLATE))
    }


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_answers_are_a_function_of_the_seed(folders, name):
    model = load_language_model(str(folders[name]), device="cpu", offline=True, max_new_tokens=12)
    before = torch.get_rng_state()
    asked = ["write a bus", "write the red tram in the rain"]
    first = model.answer(asked, seed=1)
    assert first == model.answer(asked, seed=1)
    assert first != model.answer(asked, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 2 and all(set(a.split()) <= set(VOCABULARY) for a in first)
    assert all("write" not in a.split()[:1] for a in first) or name == "plain"


def test_greedy_answer_equals_a_loop_over_the_likeliest_token(folders):
    """Oracle: no padding, no cache, no generate(); the shorter text of the batch is padded."""
    model = load_language_model(
        str(folders["chat"]), device="cpu", offline=True, temperature=0, max_new_tokens=6
    )
    asked = ["write the red tram in the rain", "write a bus"]
    answers = model.answer(asked, seed=0)
    for instruction_, answer in zip(asked, answers, strict=True):
        words = f"<s> user {instruction_} assistant".split()
        ids = [VOCABULARY.index(word) for word in words]
        start = len(ids)
        for _ in range(6):
            logits = model.pipeline.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        expected = [VOCABULARY[i] for i in ids[start:] if i not in (1, 2, 3)]  # special tokens
        assert answer.split() == expected


def test_models_that_are_not_available(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/model"):
        load_language_model("/nowhere/model")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_language_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download nobody/nothing.*leave --offline out"):
        load_language_model("nobody/nothing", offline=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["plain"].iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="weights or tokenizer are missing"):
        load_language_model(str(broken), offline=True)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_language_model(str(folders["plain"]), dtype="int8")
    with pytest.raises(ValueError, match="--device is 'gpu'"):
        load_language_model(str(folders["plain"]), device="gpu")
