"""A causal language model of transformers as a `clouds.generation.prompt_writing.ChatModel`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clouds.device import resolve_device
from clouds.downloads import one_warning
from clouds.files import expand_user
from clouds.messages import install_extra

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


class LanguageModel:
    """A text-generation pipeline of transformers.

    Args:
        pipeline: `transformers.pipeline("text-generation", ...)`. If its tokenizer has a chat
            template, an instruction is sent as a user's message, otherwise as plain text.
        temperature: of sampling; 0 is greedy decoding.
        max_new_tokens: maximum length of an answer.

    Raises:
        ValueError: negative temperature.
    """

    def __init__(self, pipeline: Any, temperature: float = 0.9, max_new_tokens: int = 640) -> None:
        if temperature < 0:
            raise ValueError(f"the temperature is {temperature}; it must not be negative")
        self.pipeline = pipeline
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature > 0:
            self.options |= {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        tokenizer = pipeline.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if tokenizer.chat_template:  # enable_thinking: no reasoning text; other models ignore it
            self.options["tokenizer_encode_kwargs"] = {"enable_thinking": False}

    @property
    def dtype(self) -> str:
        """Data type of the weights, such as 'float32'."""
        return str(self.pipeline.model.dtype).removeprefix("torch.")

    def answer(self, instructions: Sequence[str], seed: int) -> list[str]:
        """Generate one answer per instruction, all in one batch, with this random seed.

        The global random state is not changed. Answers are reproducible for the same machine,
        version of torch and batch; otherwise rounding may change a token.

        Raises:
            MemoryError: out of GPU memory.
        """
        import torch

        if self.pipeline.tokenizer.chat_template:
            inputs: list[Any] = [[{"role": "user", "content": text}] for text in instructions]
        else:
            inputs = [text + "\n\n" for text in instructions]
        device = self.pipeline.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                outputs = self.pipeline(
                    inputs,
                    batch_size=len(inputs),
                    return_full_text=False,
                    pad_token_id=self.pipeline.tokenizer.pad_token_id,
                    **self.options,
                )
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU's memory is too small for {len(instructions)} answers at once. Use a "
                "smaller --batch-size, --dtype bfloat16, or a smaller model."
            ) from error
        return [str(choices[0]["generated_text"]) for choices in outputs]


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
        dtype: one of `DTYPES`; 'auto' means bfloat16 on a GPU and float32 on a CPU.
        device: 'auto', 'cpu', 'cuda' or 'cuda:<number>'.
        offline: use the local cache only.
        temperature, max_new_tokens: see `LanguageModel`.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the model is not available; the message says how to get it.
        ValueError: it is not a causal language model, or an invalid device or dtype.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(
            f"writing prompts needs transformers: {install_extra('generate')}"
        ) from error
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    torch_device = resolve_device(device, "--device")
    if dtype == "auto":
        dtype = "bfloat16" if torch_device.type == "cuda" else "float32"
    _check_folder(model)
    try:
        # Loaded here: `pipeline` reports missing files and wrong model types in the same way.
        with one_warning():
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=offline)
            network = transformers.AutoModelForCausalLM.from_pretrained(
                model, local_files_only=offline, dtype=getattr(torch, dtype)
            )
    except OSError as error:
        raise FileNotFoundError(_download_advice(model, offline)) from error
    except ValueError as error:
        raise ValueError(f"transformers knows no causal language model for {model}") from error
    pipeline = transformers.pipeline(
        "text-generation", model=network, tokenizer=tokenizer, device=torch_device
    )
    logger.info("%s: %s on %s", model, dtype, torch_device)
    return LanguageModel(pipeline, temperature, max_new_tokens)


def _check_folder(model: str) -> None:
    """Raise FileNotFoundError for a path that is not a folder with a model, before any download."""
    path = expand_user(model)
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {model} with a language model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"the folder {model} has no config.json, so it is not a model")


def _download_advice(model: str, offline: bool) -> str:
    if Path(model).is_dir():
        return (
            f"the model in {model} cannot be read: weights or tokenizer are missing or broken. "
            "Copy the whole folder again."
        )
    where = "in the local cache" if offline else "in the local cache or on the Hugging Face hub"
    other = "leave --offline out" if offline else "check its name and the connection"
    return (
        f"the model {model!r} is not {where}. To get it: `hf download {shlex.quote(model)}` "
        "(`hf auth login` first if its license must be accepted), or give a folder that contains "
        f"it; or {other}."
    )
