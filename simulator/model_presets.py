"""Published models as TOML files in which every value says where it comes from; what is not known is left out.

A trace's own ``meta.json`` always wins over a preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from simulator.preset_files import Text, preset_model, read_preset
from tracer.errors import unknown
from tracer.schema import SCORE_FUNCTIONS

FOLDER = Path(__file__).parent / "presets" / "models"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Architecture and decoding setting of a published model; None where its preset does not say.

    Sizes are in elements, ``expert_bytes`` in bytes of one routed expert as published (``dtype``). ``num_dense_layers`` are the
    first ones. ``sources`` maps every given field to where its value comes from.
    """

    name: str
    description: str
    sources: dict[str, str]
    model_type: str | None = None
    class_name: str | None = None
    dtype: str | None = None
    num_layers: int | None = None
    num_dense_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    score_function: str | None = None
    norm_topk_prob: bool | None = None
    expert_bias: bool | None = None  # whether selection adds one
    routed_scaling_factor: float | None = None
    num_shared_experts: int | None = None
    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    expert_params: int | None = None
    expert_bytes: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    mask_id: int | None = None
    eos_id: int | None = None
    block_length: int | None = None
    steps: int | None = None
    threshold: float | None = None

    @property
    def moe_layers(self) -> tuple[int, ...] | None:
        """Indices of the layers with routed experts, None where the preset does not say which are dense."""
        if self.num_layers is None or self.num_dense_layers is None:
            return None
        return tuple(range(self.num_dense_layers, self.num_layers))


MAY_BE_ZERO = ("num_dense_layers", "num_shared_experts", "mask_id", "eos_id")

_FROM_0 = Annotated[int, Field(ge=0, description="a whole number from 0")]
_TYPES = {
    "str | None": Text,
    "bool | None": Annotated[bool, Field(description="true or false")],
    "int | None": Annotated[int, Field(ge=1, description="a whole number from 1")],
    "float | None": Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")],
}
_FILE = preset_model(
    {name: _TYPES[kind] for name, kind in ModelSpec.__annotations__.items() if kind in _TYPES}
    | {"score_function": Annotated[Literal["softmax", "sigmoid"], Field(description=" or ".join(SCORE_FUNCTIONS))]}
    | dict.fromkeys(MAY_BE_ZERO, _FROM_0)
)


def model_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def load_model_spec(name: str) -> ModelSpec:
    """A model by preset name or path to a .toml file.

    Parameters
    ----------
    name : str
        One of :func:`model_names`, or a path.

    Raises
    ------
    UserError
        No such preset or file, an entry that a model does not have, or a value of the wrong kind or without a source.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or (path.parent == FOLDER and path.stem not in model_names()):
        raise unknown("model preset", name, model_names(), ", or give a .toml file")
    texts, given = read_preset(path, "model", _FILE)
    return ModelSpec(
        name=path.stem,
        description=texts["description"],
        sources={key: source for key, (_, source) in given.items()},
        **{key: value for key, (value, _) in given.items()},
    )
