"""Load the model a capture runs: a bundled demo model, a local folder, a hub id, or random weights from a config file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracer.errors import UserError
from tracer.families import DecodingFacts, decoding_facts

DEMO_MODELS = ("llada2", "sdar")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to decode.

    ``loop`` is the decoding loop that fits it: "llada2", "sdar" or "own" (its own ``generate``). ``context`` is the longest
    sequence it takes, None when unknown. ``tokenizer`` has ``encode(text) -> list[int]``, or is None.
    """

    model: Any
    id: str
    loop: str
    tokenizer: Any | None
    mask_id: int | None
    eos_id: int | None
    pad_id: int | None
    block_length: int | None
    context: int | None
    vocab_size: int
    revision: str | None = None


class FileTokenizer:
    """A ``tokenizer.json`` read by the tokenizers library, for folders without tokenizer classes."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class PlainTokenizer:
    """A transformers tokenizer, without special tokens added."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def load_model(
    spec: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    mask_id: int | None = None,
    eos_id: int | None = None,
) -> LoadedModel:
    """Load a model by name.

    Parameters
    ----------
    spec : str
        ``demo:llada2``, ``demo:sdar``, ``random:CONFIG.json``, a local folder, or a Hugging Face id.
    device : str
        ``auto`` (CUDA where there is one, else CPU) or a torch device.
    dtype : str, optional
        ``float32``, ``bfloat16`` or ``float16``; by default the checkpoint's, and float32 on a CPU.
    device_map : str, optional
        Passed to ``from_pretrained``; spreads a model over several devices (needs accelerate).
    trust_remote_code : bool
        Run Python files that come with the checkpoint. Off unless asked.
    seed : int
        Of the random weights of ``random:``.
    mask_id, eos_id : int, optional
        Mask and end token; by default what the configuration or the model's family says.

    Raises
    ------
    UserError
        Unknown name, missing folder, unreadable config, or a checkpoint whose code was not allowed to run.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}.")
    target = _device(device)
    wanted = getattr(torch, dtype) if dtype else (torch.float32 if target.type == "cpu" else None)
    _register_compact()
    if spec.startswith("random:"):
        config_file = Path(spec.removeprefix("random:"))
        model, folder, name = _random(config_file, seed, wanted), None, f"random:{config_file.name}"
    else:
        folder, name = _locate(spec)
        model = _pretrained(folder or spec, spec, wanted, device_map, trust_remote_code)
    if device_map is None:
        model = model.to(target)
    model.eval()
    tokenizer = None if spec.startswith("random:") else _tokenizer(folder, spec, trust_remote_code)
    return _describe(model, name, tokenizer, decoding_facts(model, mask_id, eos_id))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError):
        raise UserError(f"Device '{device}' is not available here; use --device cpu or auto.") from None
    return target


def _register_compact() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tracer.demo.configuration_llada2 import LLaDA2MoeConfig
    from tracer.demo.modeling_llada2 import LLaDA2MoeModelLM

    AutoConfig.register(LLaDA2MoeConfig.model_type, LLaDA2MoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)


def _locate(spec: str) -> tuple[Path | None, str]:
    if spec.startswith("demo:"):
        name = spec.removeprefix("demo:")
        if name not in DEMO_MODELS:
            raise UserError(
                f"There is no demo model '{name}'; there are {' and '.join('demo:' + n for n in DEMO_MODELS)}."
            )
        return Path(__file__).parent / "demo" / name, spec
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{spec} holds no config.json, so it is not a model folder.")
        # The folder's name only: a trace carries no path of the machine it was made on.
        return path, path.resolve().name
    if spec.endswith(".json"):
        raise UserError(f"{spec} is a config without weights; random:{spec} draws some.")
    if spec.count("/") != 1 or spec.startswith(("./", "../", "/", "~")):
        raise UserError(f"There is no model folder {spec}; name a folder, a hub id, demo:llada2 or demo:sdar.")
    return None, spec


def _pretrained(source: Path | str, spec: str, dtype, device_map: str | None, trust_remote_code: bool):
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    # from_pretrained took torch_dtype before transformers 4.56 and warns about that name since.
    name = "dtype" if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56) else "torch_dtype"
    options: dict[str, Any] = {name: dtype or "auto", "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            first = "it brings its own Python files, which run only with --trust-remote-code"
        raise UserError(f"The model {spec} could not be loaded: {first.rstrip('.')}.") from error


def _random(path: Path, seed: int, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise UserError(f"{path} is not a model config: it needs a 'model_type'.")
        fields = {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype", "transformers_version")}
        config = AutoConfig.for_model(**fields)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype or torch.float32)
    except FileNotFoundError:
        raise UserError(f"There is no config file {path}.") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"No model can be made from {path}: {str(error).splitlines()[0].rstrip('.')}.") from error


def _tokenizer(folder: Path | None, spec: str, trust_remote_code: bool):
    if (
        folder is not None
        and (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer_config.json").is_file()
    ):
        return FileTokenizer(folder / "tokenizer.json")
    from transformers import AutoTokenizer

    try:
        return PlainTokenizer(AutoTokenizer.from_pretrained(folder or spec, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _describe(model, name: str, tokenizer, facts: DecodingFacts) -> LoadedModel:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return LoadedModel(
        model=model,
        id=name,
        loop=facts.loop,
        tokenizer=tokenizer,
        mask_id=facts.mask_id,
        eos_id=facts.eos_id,
        pad_id=getattr(config, "pad_token_id", None),
        block_length=facts.block_length,
        context=getattr(text, "max_position_embeddings", None),
        vocab_size=int(text.vocab_size),
        revision=getattr(config, "_commit_hash", None),
    )
