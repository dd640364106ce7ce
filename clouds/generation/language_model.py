"""Any causal language model of transformers, answering instructions; see `prompt_writer.Writer`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clouds.device import resolve_device

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENS_PER_PROMPT = 64


class LanguageModel:
    """A loaded model with its tokenizer.

    Args:
        model: of transformers, in evaluation mode on its device.
        tokenizer: its own. If it has a chat template, the instruction is a user's message in it;
            otherwise the text goes to the model as it is.
        temperature: of sampling; 0 takes the likeliest token each time.
        max_new_tokens: where an answer is cut off.
    """

    def __init__(
        self, model: Any, tokenizer: Any, temperature: float = 0.9, max_new_tokens: int = 640
    ) -> None:
        if temperature < 0:
            raise ValueError(f"the temperature is {temperature}; it must not be negative")
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        tokenizer.padding_side = "left"  # so that all answers begin at one place
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def answer(self, instructions: Sequence[str], seed: int) -> list[str]:
        """One answer for each instruction, sampled with random numbers of this seed.

        The global random state is left as it was. Answers are the same for one machine, version
        of torch and batch; beyond that, rounding may choose another token.

        Raises:
            MemoryError: the GPU's memory is too small.
        """
        import torch

        device = self.model.device
        inputs = self.tokenizer(
            [self._text(instruction) for instruction in instructions],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not self.tokenizer.chat_template,  # a template brings its own
            return_token_type_ids=False,
        ).to(device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": 0.95}
        gpus = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=gpus), torch.inference_mode():
                torch.manual_seed(seed)
                tokens = self.model.generate(
                    **inputs,
                    **sampling,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU's memory is too small for {len(instructions)} answers at once. Use a "
                "smaller --batch-size, --dtype bfloat16, or a smaller model."
            ) from error
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def _text(self, instruction: str) -> str:
        if not self.tokenizer.chat_template:
            return instruction + "\n\n"
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # for models that think aloud first; others pass it over
        )
        return text


def load_language_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    offline: bool = False,
    temperature: float = 0.9,
    max_new_tokens: int = 640,
) -> LanguageModel:
    """Load a model from a folder, or by its id on the Hugging Face hub.

    Args:
        model: id or folder.
        dtype: one of `DTYPES`; auto: bfloat16 on a GPU, float32 on a CPU.
        device: auto, cpu, cuda or cuda:<number>.
        offline: take the model from the local cache and ask no server.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the model is not there; the message says how to get it.
        ValueError: it is no causal language model, or the device does not exist.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(
            "writing prompts needs transformers: pip install 'clouds-dgss[generate]'"
        ) from error
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    place = resolve_device(device, "--device")
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    _check_folder(model)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    how = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=offline)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, local_files_only=offline, **how
        )
    except OSError as error:
        raise FileNotFoundError(_how_to_get(model, offline)) from error
    except ValueError as error:
        raise ValueError(f"{model} is no causal language model that transformers knows") from error
    network = network.to(place).eval()
    logger.info("%s: %s on %s", model, dtype, place)
    return LanguageModel(network, tokenizer, temperature, max_new_tokens)


def _check_folder(model: str) -> None:
    """Refuse what can only be meant as a folder and is none, before a server is asked for it."""
    path = Path(model).expanduser()
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {model} with a language model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{model} holds no config.json, so it is no model that transformers saved"
        )


def _how_to_get(model: str, offline: bool) -> str:
    if Path(model).is_dir():
        return (
            f"the model in {model} cannot be read: weights or tokenizer are missing or broken. "
            "Copy the whole folder again."
        )
    where = "in the local cache" if offline else "in the local cache or on the Hugging Face hub"
    other = "leave --offline out" if offline else "check its name and the connection"
    return (
        f"the model {model!r} is not {where}. To get it: `hf download {model}` (`hf auth login` "
        f"first if its license must be accepted), or give a folder that holds it; or {other}."
    )
