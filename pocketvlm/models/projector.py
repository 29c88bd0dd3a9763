"""What turns tower features into decoder embeddings: a merge of patches, then steps per token.

The merge says how many visual tokens a picture costs. Everything after it works on one token at a
time, so that tokens may be dropped between the two without changing the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

__all__ = [
    "ActivationStep",
    "GatedStep",
    "LinearStep",
    "NormStep",
    "ProjectorSpec",
    "ProjectorStep",
    "StepOps",
    "TapSpec",
    "run_steps",
    "step_linears",
]

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True)
class LinearStep:
    """A linear layer.

    Attributes:
        name: Its module.
        out_features: Channels that it returns.
        has_bias: Whether it adds a bias.
    """

    kind: Literal["linear"] = "linear"
    name: str
    out_features: int
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class NormStep:
    """A norm over the channels.

    Attributes:
        name: Its module.
        eps: What is added to the variance.
        has_bias: Whether it is a LayerNorm, with a bias, or an RMSNorm, without one.
    """

    kind: Literal["norm"] = "norm"
    name: str
    eps: float
    has_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class ActivationStep:
    """An activation.

    Attributes:
        activation: Hugging Face's name of it.
    """

    kind: Literal["activation"] = "activation"
    activation: str


@dataclass(frozen=True, kw_only=True)
class GatedStep:
    """Two linear layers of the same input: the activation of one times the other.

    Attributes:
        gate: The module that is activated.
        up: The other one.
        out_features: Channels that each of them returns.
        has_bias: Whether they add a bias.
        activation: Hugging Face's name of the activation.
    """

    kind: Literal["gated"] = "gated"
    gate: str
    up: str
    out_features: int
    has_bias: bool
    activation: str


ProjectorStep = LinearStep | NormStep | ActivationStep | GatedStep


def step_linears(step: ProjectorStep) -> tuple[str, ...]:
    """Module names of the linear layers of a step, which read the same input."""
    if isinstance(step, LinearStep):
        return (step.name,)
    return (step.gate, step.up) if isinstance(step, GatedStep) else ()


@dataclass(frozen=True, kw_only=True)
class ProjectorSpec:
    """From the tower's features, [tokens, hidden], to rows of the decoder.

    Attributes:
        merge_factor: Side of the square of patches that becomes one visual token; 1 for none.
        steps: What follows, token by token.
        merge: What a token is: the patches' channels side by side in raster order, or their mean.
        patch_norm: What each patch passes before it is merged; `None` for nothing.
    """

    merge_factor: int
    steps: tuple[ProjectorStep, ...]
    merge: Literal["concatenate", "average"] = "concatenate"
    patch_norm: NormStep | None = None

    def merged_width(self, hidden: int) -> int:
        """Channels of a visual token, from those of a patch."""
        return hidden * (self.merge_factor**2 if self.merge == "concatenate" else 1)

    @property
    def linears(self) -> tuple[str, ...]:
        """Module names of the linear layers, in order of use."""
        return tuple(name for step in self.steps for name in step_linears(step))

    @property
    def norms(self) -> tuple[str, ...]:
        """Module names of the norms, in order of use."""
        steps = (*filter(None, (self.patch_norm,)), *self.steps)
        return tuple(step.name for step in steps if isinstance(step, NormStep))


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """Rows that a block within the tower adds to the decoder: DeepStack (arXiv 2406.04334).

    Attributes:
        block: Index of the block whose output is taken.
        steps: What follows the merge of its patches, token by token. The rows are added to those of
            the visual tokens after a block of the decoder: the first tap's after its first block.
    """

    block: int
    steps: tuple[ProjectorStep, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Module names of the linear layers, in order of use."""
        return tuple(name for step in self.steps for name in step_linears(step))


class StepOps(Protocol[ValueT]):
    """What a projector needs of a graph's operators, `GraphOps` among others."""

    def linear(self, inputs: ValueT, /, *names: str) -> ValueT:
        """A linear layer by its name."""
        ...

    def norm(self, inputs: ValueT, name: str, /) -> ValueT:
        """A norm by its name."""
        ...

    def activation(self, inputs: ValueT, kind: str, /) -> ValueT:
        """An activation by the name that Hugging Face gives it."""
        ...

    def gated(self, joined: ValueT, gate: str, up: str, kind: str, /) -> ValueT:
        """`activation(gate) * up` of what `linear` made of both names."""
        ...


def run_steps(ops: StepOps[ValueT], steps: tuple[ProjectorStep, ...], features: ValueT) -> ValueT:
    """Runs the steps of a projector, or some of them, over any kind of value."""
    for step in steps:
        if isinstance(step, LinearStep):
            features = ops.linear(features, step.name)
        elif isinstance(step, NormStep):
            features = ops.norm(features, step.name)
        elif isinstance(step, GatedStep):
            joined = ops.linear(features, step.gate, step.up)
            features = ops.gated(joined, step.gate, step.up, step.activation)
        else:
            features = ops.activation(features, step.activation)
    return features
