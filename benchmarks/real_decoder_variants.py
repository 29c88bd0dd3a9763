"""What `real_decoder.py` compares: every method at every size, as stages.

Only the linear layers of the decoder's blocks are changed, as in the papers. The tower is a small
one that this project trained, what it says passes a random connector, and tables take more bits in
every recipe. Statistics count every token alike, since a picture means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shared_scores import SharedEcoflap, SharedGblm

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.pruning.depth.block_influence import BlockInfluence
from pocketvlm.compress.pruning.depth.greedy_blocks import Greedy
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.unstructured.allocation import Uniform
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import Pattern, SemiStructured, Unstructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune, Score
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.pruning.width.taylor import Taylor
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.grid import GridKind
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.stage import Codebook, CodebookRule
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.mixed.search_space import Option
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import Stage

__all__ = ["VARIANTS", "Shared", "Variant"]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What variants share.

    Attributes:
        folder: Where gradients and scores are kept that several of them need.
        more_text: Makes the calibration set with other text beside it.
    """

    folder: Path
    more_text: Callable[[], CalibrationSet]


Stages = Callable[[ModelSpec, Shared], tuple[Stage, ...]]
"""From the model and what variants share."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
        section: The table that it stands in.
        label: Its method.
        stages: Makes its stages.
        baseline: The variant that it is compared with.
        is_calibrated: Whether another calibration set gives another model.
        int8_inputs: Whether layers on integer grids are judged with inputs in int8, as ONNX Runtime
            computes them.
    """

    section: str
    label: str
    stages: Stages
    baseline: str | None = None
    is_calibrated: bool = True
    int8_inputs: bool = False


_ALIKE: ModalityWeighting = "uniform"
_ROTATE = Rotate(tower=False, untie_head=True)


def _grid(bits: int, group: int | None) -> tuple[WeightRule, ...]:
    return (WeightRule(part="decoder", bits=bits, group_size=group),)


def _rtn(bits: int, group: int | None, *, grid: GridKind = "min_max") -> RoundToNearest:
    return RoundToNearest(rules=_grid(bits, group), grid=grid)


def _gptq(
    bits: int,
    group: int | None,
    *,
    grid: GridKind = "min_max",
    weights: ModalityWeighting = _ALIKE,
) -> Gptq:
    return Gptq(rules=_grid(bits, group), grid=grid, modality_weights=weights)


def _awq(bits: int, group: int | None) -> Awq:
    return Awq(rules=_grid(bits, group), modality_weights=_ALIKE)


def _codebook(index_bits: int, length: int) -> Codebook:
    rule = CodebookRule(part="decoder", index_bits=index_bits, vector_length=length)
    return Codebook(rules=(rule,), modality_weights=_ALIKE)


def _fixed(*stages: Stage) -> Stages:
    return lambda _spec, _shared: stages


def _affine(bits: int, group: int | None, section: str) -> dict[str, Variant]:
    """Integer grids of one size by every method."""
    size = f"{bits}-{'rows' if group is None else f'g{group}'}"
    stages: dict[str, tuple[Stage, ...]] = {
        "RTN": (_rtn(bits, group),),
        "GPTQ": (_gptq(bits, group),),
        "GPTQ, searched grids": (_gptq(bits, group, grid="mse"),),
        "GPTQ, tokens by gradient": (_gptq(bits, group, weights="gradient"),),
        "AWQ": (_awq(bits, group), _rtn(bits, group)),
        "AWQ, searched grids": (_awq(bits, group), _rtn(bits, group, grid="mse")),
        "AWQ + GPTQ": (_awq(bits, group), _gptq(bits, group)),
        "rotation": (_ROTATE, _rtn(bits, group)),
        "rotation + GPTQ": (_ROTATE, _gptq(bits, group)),
    }
    names = {label: f"{size}/{_slug(label)}" for label in stages}
    return {
        names[label]: Variant(
            section=section,
            label=label,
            stages=_fixed(*chosen),
            baseline=None if label == "GPTQ" else names["GPTQ"],
            is_calibrated=label not in ("RTN", "rotation"),
        )
        for label, chosen in stages.items()
    }


_AFFINE_MENU: tuple[Option, ...] = tuple(
    WeightRule(bits=width, group_size=group)
    for width, group in ((2, 64), (2, 32), (3, None), (3, 64), (4, 64))
)
_CODEBOOK_MENU: tuple[Option, ...] = (
    *(CodebookRule(index_bits=bits, vector_length=4) for bits in (6, 8, 9)),
    CodebookRule(index_bits=6, vector_length=2),
    WeightRule(bits=4, group_size=64),
)


def _mixed(bits: float, options: tuple[Option, ...] = _AFFINE_MENU) -> Stages:
    """An average over the decoder; everything else stays float."""

    def stages(spec: ModelSpec, _shared: Shared) -> tuple[Stage, ...]:
        sizes = {"decoder": 0, "rest": 0}
        for linear in spec.linears():
            part = "decoder" if linear.part == "decoder" else "rest"
            sizes[part] += linear.out_features * linear.in_features
        return (
            MixedPrecision(
                options=options,
                pins=tuple(
                    WeightRule(part=part, bits=None) for part in ("tower", "projector", "embedding")
                ),
                budget_bytes=int(sizes["decoder"] * bits / 8) + 2 * sizes["rest"],
                samples=2,
                held_out=0.125,
                modality_weights=_ALIKE,
            ),
        )

    return stages


_PRUNED = (PruneRule(part="decoder"),)
_ONE_BY_ONE = Unstructured()
_SCORES: dict[str, Score] = {
    "magnitude": Magnitude(),
    "Wanda": Wanda(),
    "GBLM l1": Gblm(norm="l1"),
    "GBLM l2": Gblm(norm="l2"),
    "GBLM l1, alpha 0.1": Gblm(norm="l1", alpha=0.1),
    "GBLM l1, alpha 0.3": Gblm(norm="l1", alpha=0.3),
    "GBLM l1, shrunk": Gblm(norm="l1", shrink=True),
    "GBLM l1, alpha 10": Gblm(norm="l1", alpha=10),
    "GBLM block": Gblm(gradient="block"),
    "SparseGPT": SparseGpt(),
}


def _prune(
    label: str,
    ratio: float,
    pattern: Pattern = _ONE_BY_ONE,
    *,
    budget: Ecoflap | None = None,
    weights: ModalityWeighting = _ALIKE,
    widened: bool = False,
) -> Stages:
    def stages(_spec: ModelSpec, shared: Shared) -> tuple[Stage, ...]:
        score, folder = _SCORES[label], shared.folder
        if isinstance(score, Gblm):
            samples = shared.more_text() if widened else None
            score = SharedGblm(**asdict(score), folder=folder, samples=samples)
        allocation: Uniform | Ecoflap = Uniform()
        if budget is not None:
            allocation = SharedEcoflap(**asdict(budget), folder=folder)
        return (
            Prune(
                score=score,
                ratio=ratio,
                rules=_PRUNED,
                pattern=pattern,
                allocation=allocation,
                modality_weights=weights,
            ),
        )

    return stages


def _pruned(percent: int) -> dict[str, Variant]:
    """One sparsity by every score, with a uniform budget and with ECoFLaP's."""
    section, ratio = f"{percent} % removed", percent / 100
    found = {
        f"{percent}%/{_slug(label)}": Variant(
            section=section,
            label=label,
            stages=_prune(label, ratio),
            baseline=None if label == "Wanda" else f"{percent}%/wanda",
            is_calibrated=label != "magnitude",
        )
        for label in _SCORES
    }
    for label in ("Wanda", "SparseGPT"):
        found[f"{percent}%/{_slug(label)}-by-gradient"] = Variant(
            section=section,
            label=f"{label}, tokens by gradient",
            stages=_prune(label, ratio, weights="gradient"),
            baseline=f"{percent}%/{_slug(label)}",
        )
    for label in ("GBLM l1", "GBLM l1, alpha 0.1"):
        found[f"{percent}%/{_slug(label)}-more-gradients"] = Variant(
            section=section,
            label=f"{label}, gradients of four times the text",
            stages=_prune(label, ratio, widened=True),
            baseline=f"{percent}%/wanda",
        )
    for grouping in ("block", "layer"):
        budget = Ecoflap(order="first", group=grouping)
        for label in ("magnitude", "Wanda", "GBLM l1", "SparseGPT"):
            found[f"{percent}%/ecoflap-{grouping}+{_slug(label)}"] = Variant(
                section=section,
                label=f"{label}, ECoFLaP by {grouping}",
                stages=_prune(label, ratio, budget=budget),
                baseline=f"{percent}%/{_slug(label)}",
            )
    return found


def _two_of_four() -> dict[str, Variant]:
    return {
        f"2:4/{_slug(label)}": Variant(
            section="2 of 4 removed",
            label=label,
            stages=_prune(label, 0.5, SemiStructured()),
            baseline=None if label == "Wanda" else "2:4/wanda",
            is_calibrated=label != "magnitude",
        )
        for label in _SCORES
    }


def _slug(label: str) -> str:
    return label.lower().replace(" + ", "+").replace(",", "").replace(" ", "-")


def _structured() -> dict[str, Variant]:
    section = "a quarter of the decoder removed"
    narrower = PruneWidth(decoder_parameters=0.25, modality_weights=_ALIKE)
    return {
        "25%/width-flap": Variant(section=section, label="width, FLAP", stages=_fixed(narrower)),
        "25%/width-flap-plain": Variant(
            section=section,
            label="width, FLAP, not made up for",
            stages=_fixed(replace(narrower, compensate="none")),
            baseline="25%/width-flap",
        ),
        "25%/width-taylor": Variant(
            section=section,
            label="width, Taylor",
            stages=_fixed(replace(narrower, importance=Taylor())),
            baseline="25%/width-flap",
        ),
        "25%/depth-influence": Variant(
            section=section,
            label="depth (8 of 30 blocks), block influence",
            stages=_fixed(PruneDepth(decoder_blocks=8, importance=BlockInfluence())),
            baseline="25%/width-flap",
        ),
        "25%/depth-greedy": Variant(
            section=section,
            label="depth (8 of 30 blocks), greedy",
            stages=_fixed(PruneDepth(decoder_blocks=8, importance=Greedy())),
            baseline="25%/width-flap",
        ),
    }


_TWO_BITS = "2 to 2.75 bits"
_DISTILL = Distill(parts=("decoder",), rank=16, steps=40, batch_size=4, check_every=10)
_VPTQ = ((8, 4), (9, 4), (10, 4))

VARIANTS: dict[str, Variant] = {
    "float": Variant(section="float", label="float", stages=_fixed(), is_calibrated=False),
    **_affine(3, 64, "3 bits, groups of 64"),
    **_affine(3, None, "3 bits, one scale per row"),
    "3-rows/lut": Variant(
        section="3 bits, one scale per row",
        label="look-up table of 8 numbers",
        stages=_fixed(_codebook(3, 1)),
        baseline="3-rows/gptq",
    ),
    "3/mixed": Variant(
        section="3 bits, one scale per row",
        label="mixed, 3.02 bits",
        stages=_mixed(3.02),
        baseline="3-rows/gptq",
    ),
    **_affine(2, 32, _TWO_BITS),
    **{
        f"{bits / length:g}/vptq": Variant(
            section=_TWO_BITS,
            label=f"VPTQ, {2**bits} vectors of {length}",
            stages=_fixed(_codebook(bits, length)),
            baseline="2-g32/gptq",
        )
        for bits, length in _VPTQ
    },
    "2.25/mixed": Variant(
        section=_TWO_BITS,
        label="mixed codebooks, 2.25 bits",
        stages=_mixed(2.25, _CODEBOOK_MENU),
        baseline="2.25/vptq",
    ),
    "2.75/mixed": Variant(
        section=_TWO_BITS, label="mixed, 2.75 bits", stages=_mixed(2.75), baseline="2-g32/gptq"
    ),
    **_pruned(50),
    **_pruned(60),
    **_two_of_four(),
    **_structured(),
    **_pruned(30),
    **_pruned(70),
    "int8/inputs": Variant(
        section="3 bits, groups of 64",
        label="GPTQ, inputs in int8",
        stages=_fixed(_gptq(3, 64)),
        baseline="3-g64/gptq",
        int8_inputs=True,
    ),
    "int8/cache": Variant(
        section="float",
        label="float, KV cache in int8",
        stages=_fixed(QuantizeCache()),
        baseline="float",
    ),
}


def _recovered(name: str) -> Variant:
    """A variant, and a short distillation after it."""
    variant = VARIANTS[name]
    return replace(
        variant,
        label=f"{variant.label}, distilled (rank {_DISTILL.rank}, {_DISTILL.steps} steps)",
        stages=lambda spec, shared: (*variant.stages(spec, shared), _DISTILL),
        baseline=name,
        is_calibrated=True,
    )


VARIANTS |= {
    f"{name}+distill": _recovered(name)
    for name in (
        *("50%/magnitude", "50%/wanda", "50%/gblm-l1-alpha-0.1", "50%/sparsegpt"),
        *("60%/wanda", "60%/ecoflap-block+wanda", "70%/wanda", "70%/ecoflap-block+wanda"),
        *("2:4/wanda", "2:4/sparsegpt", "25%/width-flap", "25%/depth-influence"),
    )
}
